"""Do explanations tell the truth? `fastq.truth` with more players and lives than a demo asks: `make bench ARGS="-k truth"`.

FASTQ_BENCH_WORKSPACE names a demo's workspace to use instead of training one, FASTQ_BENCH_BUNDLE a bundle.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastq import registry, truth, worlds
from fastq.platform import load_platform
from fastq.policy import Policy

PEOPLE, LIVES = int(os.environ.get("FASTQ_BENCH_PEOPLE", "200")), int(os.environ.get("FASTQ_BENCH_LIVES", "24"))
SEED = int(os.environ.get("FASTQ_BENCH_SEED", "4711"))  # seeds from 100 to 199 are for choosing, all others for reporting


@pytest.fixture(scope="module")
def policy(fastq, tmp_path_factory):
    if given := os.environ.get("FASTQ_BENCH_BUNDLE"):
        return Policy.load(Path(given))
    if given := os.environ.get("FASTQ_BENCH_WORKSPACE"):
        root = Path(given)
    else:
        root = tmp_path_factory.mktemp("truth")
        worlds.write_logs(worlds.world("arena"), root, seed=100)
        fastq("retrain", "--json", cwd=root, code=(0, 1))
    platform = load_platform(root)
    return registry.load_policy(f"models:/{platform.platform}@{registry.resolve(platform, 'champion')}", root)


def test_truth(policy) -> None:
    found = truth.examine(policy, worlds.world("arena"), people=PEOPLE, lives=LIVES, seed=SEED)
    own = {key: value for key, value in policy.details["own_response"].items() if key != "covariance"}
    print(f"\n{found['states']} states, {LIVES} lives of {found['days']} days; own response {own}")
    for row in found["contrasts"]:
        print(
            f"against {row['against']}: 90 % intervals hold the truth in {row['share']:.1%} ({row['low']:.1%} to {row['high']:.1%}); "
            f"half width {row['half_width']:.2f}, luck {row['luck']:.2f}, mean error {row['mean_error']:+.3f}, size of an error {row['size_of_error']:.2f}"
        )
    for name, row in found["reasons"].items():
        print(f"stated reasons, {name}: {row['share']:.1%} of {row['of']} hold")
    print(f"warnings: {found['warnings']}")
    for row in found["deletion"]:
        print(f"{row['measures']} measures deleted move the value by {row['by_attribution']:.3f} by attribution, {row['at_random']:.3f} at random")
