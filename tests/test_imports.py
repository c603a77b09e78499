"""Importing does nothing: names load on first use, heavy libraries inside functions, and serving without what trains."""

import json
import pkgutil
import subprocess
import sys

import pytest

import fastq

HEAVY = [
    "captum",
    "feast",
    "great_expectations",
    "matplotlib",
    "mlflow",
    "pandas",
    "polars",
    "prefect",
    "pyarrow",
    "pydantic",
    "pytorch_lightning",
    "ray",
    "scipy",
    "sklearn",
    "torch",
]


def loaded_by(program, cwd=None):
    """The modules in memory after a program, in a process of its own."""
    code = f"{program}\nimport json, sys; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, cwd=cwd)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout == ""
    return set(json.loads(finished.stderr.splitlines()[-1]))


def test_the_public_names_are_these():
    assert fastq.__all__ == ["FastqError", "Platform", "PlayerStates", "Policy", "Recommendation", "connect", "load_platform", "load_policy"]
    assert dir(fastq) == sorted(fastq.__all__)


@pytest.mark.parametrize("name", fastq.__all__)
def test_every_public_name_is_there(name):
    assert getattr(fastq, name).__name__ == name
    assert getattr(fastq, name).__doc__


def test_a_wrong_name_is_answered_with_the_right_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'load_plattform'; it has .*load_platform"):
        fastq.load_plattform  # noqa: B018 - the access is the test


def test_importing_fastq_loads_no_other_library_and_writes_nothing(tmp_path):
    loaded = loaded_by("import fastq", cwd=tmp_path)
    assert not loaded.intersection(HEAVY)
    assert {name for name in loaded if name.split(".")[0] == "fastq"} == {"fastq"}
    assert list(tmp_path.iterdir()) == []


def test_the_front_door_opens_without_heavy_libraries(tmp_path):
    assert not loaded_by("import fastq.cli", cwd=tmp_path).intersection([*HEAVY, "rich", "orjson"])


def test_no_module_of_the_library_loads_the_stack_on_import(tmp_path):
    """Matplotlib and scikit-learn are left out: torchmetrics, which Lightning brings, loads them by itself."""
    modules = [name for _, name, _ in pkgutil.walk_packages(fastq.__path__, "fastq.")]
    assert {"fastq.platform", "fastq.policy", "fastq.registry", "fastq.learner"} <= set(modules)
    loaded = loaded_by("\n".join(f"import {name}" for name in modules), cwd=tmp_path)
    assert not loaded.intersection(["captum", "feast", "great_expectations", "mlflow", "prefect", "ray"])
    assert not {name for name in loaded if name.split(".")[0] in {"pipelines", "serving", "feature_repo"}}
    assert list(tmp_path.iterdir()) == []


def test_serving_never_loads_what_trains_compares_or_simulates(tmp_path):
    loaded = loaded_by("import serving.app, serving.online, serving.endpoint", cwd=tmp_path)
    assert not loaded.intersection(["fastq.learner", "fastq.worlds", "fastq.benchmark", "fastq.cli", "pipelines", "prefect", "great_expectations"])
    # nor what takes longer to import than a replica to load its model: who waits for one that takes another's place waits for this
    assert not loaded.intersection(["fastq.representation", "pytorch_lightning", "torch._dynamo", "torchmetrics", "matplotlib", "scipy.stats", "sklearn"])


def test_help_answers(fastq, tmp_path):
    answer = fastq("--help", cwd=tmp_path, code=0)
    assert "retrain" in answer.stdout
    assert answer.stderr == ""
