"""How much of the state space each pair of policies shares, which decides what may be asked of one in the other's states.

A classifier tells from a decision's state which policy acted; what it says of players that it was not fitted on (cross-fitting) is the chance of
each policy in that state. Taken as if all policies acted equally often, the ratio of two chances is the ratio of the densities of their
states (Bickel et al., 2009), and where it is far from one, one of them was never there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from fastq.features import build_rows
from fastq.platform import Platform
from fastq.records import AnyRecords, Records
from fastq.windows import build, described
from fastq.workspace import Workspace, replacing

DECISIONS = 6_000  # at most, of whole players
FOLDS = 3
FEWEST = 50  # decisions of a policy below which nothing is said of it
LEAST_CHANCE = 0.05  # of two policies that act equally often: below it the other one is not to be found in such a state
LEAST_SHARED = 0.5  # of a policy's states in which the other one must be found for its counterfactuals to be answered


@dataclass(frozen=True)
class Overlap:
    """How far `against` is to be found in the states of `policy`.

    shared: share of these states in which `against` acts too (with at least 5 % of the chance of the two); None where too little is known.
    common: overlap of the two distributions of states, from 0 (disjoint) to 1 (the same), the integral of the smaller density.
    answerable: whether "what would `against` have brought here?" may be answered from the logs; `sentence` says why, or why not.
    """

    policy: str
    against: str
    decisions: int
    shared: float | None
    common: float | None
    answerable: bool
    sentence: str


@dataclass(frozen=True)
class Chances:
    """chance [N, K] of each of `policies` in N sampled states, as if all acted equally often; acted [N] index of the one that did."""

    policies: list[str]
    chance: np.ndarray
    acted: np.ndarray


def chances(platform: Platform, records: AnyRecords) -> Chances | None:
    """Cross-fitted chances of the policies in a sample of states; None where there are too few decisions, players or policies to tell."""
    sample = _sample(platform, records)
    data = build(platform, sample, build_rows(platform, sample))
    acted = np.bincount(data.policy, minlength=len(data.policies))
    kept = np.flatnonzero(acted >= FEWEST)
    rows = np.flatnonzero(np.isin(data.policy, kept))
    if len(kept) < 2 or len(np.unique(data.player[rows])) < FOLDS:
        return None
    place = np.full(len(data.policies), -1)
    place[kept] = np.arange(len(kept))
    label = place[data.policy[rows]]
    chance = _cross_fitted(described(data)[rows], label, data.player[rows], platform.training.seed)
    balanced = chance / np.bincount(label)
    return Chances([data.policies[k] for k in kept], balanced / balanced.sum(1, keepdims=True), label)


def _sample(platform: Platform, records: AnyRecords) -> Records:
    """All that the logs hold of some players, drawn by their ids, with `DECISIONS` decisions between them at most."""
    draw, share = pl.col("player_id").hash(platform.training.seed), 1.0
    rows = records.counts["decisions"].accepted if records.counts else 0
    if rows > 4 * DECISIONS:  # the players drawn first are enough to choose among
        share = 4 * DECISIONS / rows
    while True:
        some = records.held("decisions").filter(draw <= pl.lit(int(share * (2**64 - 1)), pl.UInt64)) if share < 1 else records.held("decisions")
        players = some.lazy().group_by("player_id").len().collect(engine="streaming").sort(draw, "player_id")
        if share >= 1 or players["len"].sum() > DECISIONS:
            break
        share *= 8  # a few of very many decisions: ask for more
    drawn = players.filter(pl.col("len").cum_sum() <= max(DECISIONS, players["len"].head(1).sum()))["player_id"].implode()
    mine = pl.col("player_id").is_in(drawn)
    decisions = some.filter(mine).lazy().collect(engine="streaming").sort("player_id", "decided_at", "decision_id")
    tables = {table: records.held(table) for table in ("activity", "players", "items")}
    players_log, items = (tables[table].lazy().collect() if tables[table].parts else None for table in ("players", "items"))
    activity = tables["activity"].filter(mine) if tables["activity"].parts else None
    return Records(decisions, activity, players_log, None, items, pl.DataFrame(), {}, {}, [])


def _cross_fitted(x: np.ndarray, label: np.ndarray, player: np.ndarray, seed: int) -> np.ndarray:
    """[N, K] chance of each label from a classifier that saw none of the same player."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedGroupKFold
    from threadpoolctl import threadpool_limits

    chance = np.tile(np.bincount(label) / len(label), (len(label), 1))
    for fitted, held in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(x, label, player):
        model = HistGradientBoostingClassifier(max_iter=40, learning_rate=0.1, max_leaf_nodes=7, min_samples_leaf=40, early_stopping=False, random_state=seed)
        present = np.unique(label[fitted])
        if len(present) > 1 and x.shape[1]:
            chance[held] = 0.0
            with threadpool_limits(1):  # so small a fit waits for its threads longer than it works
                chance[np.ix_(held, present)] = model.fit(x[fitted], label[fitted]).predict_proba(x[held])
    return np.maximum(chance, 1e-6)


def overlaps(platform: Platform, found: Chances | None) -> list[Overlap]:
    """Every ordered pair of the platform's policies."""
    names = [] if found is None else found.policies
    pairs = []
    for policy in platform.policies:
        for against in platform.policies:
            if policy == against:
                continue
            if found is None or policy not in names or against not in names:
                said = f"too few decisions to tell whether {against} is to be found where {policy} acts"
                pairs.append(Overlap(policy, against, 0, None, None, answerable=False, sentence=said))
                continue
            a, b = names.index(policy), names.index(against)
            here, there = found.chance[found.acted == a], found.chance[found.acted == b]
            shared = float((here[:, b] / (here[:, a] + here[:, b]) >= LEAST_CHANCE).mean())
            common = float((np.minimum(1, here[:, b] / here[:, a]).mean() + np.minimum(1, there[:, a] / there[:, b]).mean()) / 2)
            answerable = shared >= LEAST_SHARED
            said = f"{against} acts in {shared:.0%} of the states in which {policy} does: "
            said += f"what it would have brought there {'can' if answerable else 'cannot'} be told from these logs"
            pairs.append(Overlap(policy, against, len(here), shared, common, answerable, said))
    return pairs


def doubts(pairs: Sequence[Mapping[str, Any]], against: str | None, here: Sequence[str | None]) -> list[str]:
    """[B] why what the policy `against` would have brought cannot be told of players on whom the policies `here` acted last; empty where it can.

    Where it is not known who acted, or one that the pairs do not name, what all other policies' states refuse is refused. `pairs` as `asdict` gives them.
    """
    mine = {pair["policy"]: "" if pair["answerable"] else pair["sentence"] for pair in pairs if pair["against"] == against}
    nowhere = next(iter(mine.values()), "") if all(mine.values()) else ""
    return ["" if policy == against else mine.get(policy or "", nowhere) for policy in here]


def said_in(document: Mapping[str, Any], pairs: Sequence[Overlap]) -> dict[str, Any]:
    """An evaluation as a document whose verdicts on what a behaviour policy brings say where it is hardly ever to be found."""
    worst: dict[str, Overlap] = {}
    for pair in sorted(pairs, key=lambda pair: -1.0 if pair.shared is None else pair.shared):
        if not pair.answerable:
            worst.setdefault(pair.against, pair)

    def with_doubt(row: Mapping[str, Any], policy: str) -> dict[str, Any]:
        return {**row, "verdict": f"{row['verdict']}; {worst[policy].sentence}"} if policy in worst else dict(row)

    difference = document.get("difference")
    return {
        **document,
        "estimates": [with_doubt(row, row["policy"]) for row in document["estimates"]],
        "difference": with_doubt(difference, document["against"]) if difference else difference,
    }


def write_overlaps(workspace: Workspace, pairs: Sequence[Overlap]) -> None:
    """Keep the overlaps of the accepted logs."""
    workspace.make()
    with replacing(workspace.overlap) as partial:
        partial.write_text(json.dumps([asdict(pair) for pair in pairs]), encoding="utf-8")


def read_overlaps(workspace: Workspace) -> list[Overlap]:
    """The overlaps of the logs that were last accepted; none before the first time."""
    try:
        return [Overlap(**pair) for pair in json.loads(workspace.overlap.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []
