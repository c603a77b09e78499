"""`fastq demo`, run as a user runs it: what it says, what it leaves, what it does when it is stopped or run again."""

import hashlib
import json
import signal

import polars as pl
import pytest


def document(run):
    return json.loads(run.stdout)


def bundle(workspace):
    """The digest of each weight file of the only trained model."""
    files = sorted(p for p in (workspace / ".fastq" / "mlflow").rglob("*.safetensors"))
    assert files, "nothing was registered"
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_it_was_promoted_by_the_gate_and_answered(demo):
    """Of this many players the evidence is enough. With a third of them the gate refuses, and the demo ends with 1 and says why."""
    _, run = demo
    said = document(run)
    assert (run.code, said["promoted"]) == (0, True), said["reasons"]
    assert len(said["recommendations"]) == 10
    assert len({r["decision_id"] for r in said["recommendations"]}) == 10


def test_it_connected_to_nobody_else(demo):
    _, run = demo
    assert "connect(" in run.trace.read_text(), "the trace is empty"
    assert run.strangers() == set()


def test_what_was_validated_is_what_was_written(demo):
    workspace, run = demo
    said = document(run)["validation"]
    written = pl.scan_parquet(workspace / "logs" / "decisions" / "*.parquet").select(pl.len()).collect().item()
    assert (said["accepted"], said["quarantined"], said["repeated"]) == (written, 0, 0)
    report = workspace / said["report"]
    assert report.is_file()
    assert "http://" not in report.read_text().replace("http://www.w3.org", "")


def test_the_truth_is_the_weighted_sum_of_its_objectives_and_the_new_policy_leads(demo):
    _, run = demo
    said = document(run)
    for row in said["truth"]:
        assert row["total"] == pytest.approx(sum(said["objectives"][name] * value for name, value in row["objectives"].items()), abs=1e-9)
    totals = {row["policy"]: row["total"] for row in said["truth"]}
    assert set(totals) == {"fastq", "stretch", "retain", "spend", "mixture"}
    assert totals["fastq"] == max(totals.values())


def test_the_explanation_adds_up(demo):
    _, run = demo
    why = document(run)["explanation"]
    contrast = why["contrast"]
    assert sum(part["value"] for part in why["parts"]) == pytest.approx(why["value"], abs=1e-9)
    assert sum(part["value"] for part in contrast["parts"]) == pytest.approx(contrast["difference"], abs=1e-9)
    assert why["decision_id"] in {r["decision_id"] for r in document(run)["recommendations"]}


def test_nothing_runs_on_and_nothing_is_half_written(demo):
    workspace, run = demo
    run.gone()
    assert [str(p) for p in workspace.rglob("*") if "partial" in p.name or p.suffix in {".tmp", ".ckpt"} or p.name == "writing"] == []


def test_a_second_run_goes_on_where_the_first_was(demo, as_a_user, small):
    """It serves and explains again, but learns nothing anew; and this time it tells its story to a person."""
    workspace, first = demo
    before, registered = bundle(workspace), document(first)["version"]
    again = as_a_user("demo", "shop", *small, cwd=workspace.parent).wait()
    assert again.code == 0, again.stderr[-2000:]
    assert bundle(workspace) == before
    assert f"version {registered} is the champion" in again.stdout
    said = " ".join(again.stdout.split())
    for part in (
        "Validated decisions:",
        "Estimated from the logs",
        "In the simulator's truth",
        "Ten recommendations",
        "Why this, for",
        "Next cd shop",
        "Done in",
    ):
        assert part in said, part
    again.gone()


def test_other_logs_in_the_same_directory_are_asked_about(demo, as_a_user, small):
    workspace, _ = demo
    before = bundle(workspace)
    refused = as_a_user("demo", "shop", *small, "--seed", "5", cwd=workspace.parent).wait()
    assert refused.code == 2
    assert "--fresh" in refused.stderr
    assert bundle(workspace) == before


def test_somebody_elses_directory_is_left_alone(as_a_user, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for more in ((), ("--fresh",)):
        refused = as_a_user("demo", "mine", *more, cwd=tmp_path).wait()
        assert refused.code == 2
        assert "not empty" in refused.stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_and_the_last_run_ends_as_if_none_had_been_stopped(as_a_user, tmp_path):
    """Stopped in each stage of training, as a terminal stops it; what is registered in the end is what an undisturbed demo registers, bit for bit.

    Of players so few that the gate refuses: then the demo ends with 1, and nothing is served.
    """
    few = ("--players", "300", "--days", "20")
    (tmp_path / "stopped").mkdir()
    for stage in ("representation", "value and actor"):
        stopped = as_a_user("demo", "shop", *few, cwd=tmp_path / "stopped")
        stopped.shows(stage)
        stopped.interrupt()
        stopped.wait(120)
        assert stopped.code == 128 + signal.SIGINT, stopped.stderr[-2000:]
        stopped.gone()
        assert not (tmp_path / "stopped" / "shop" / ".fastq" / "writing").exists()
    last, undisturbed = (as_a_user("demo", "shop", "--json", *few, cwd=tmp_path / where).wait() for where in ("stopped", "."))
    assert (last.code, undisturbed.code) == (1, 1)
    assert document(last)["reasons"]
    assert bundle(tmp_path / "stopped" / "shop") == bundle(tmp_path / "shop")
    assert document(last)["estimates"] == document(undisturbed)["estimates"]


def test_real_logs(as_a_user, tmp_path):
    """The Open Bandit Dataset: too few clicks to promote on, and the random policy's value is what the other policy's log says it is."""
    run = as_a_user("demo", "bandit", "--logs", "open-bandit", "--json", cwd=tmp_path).wait()
    said = document(run)
    assert (run.code, said["promoted"]) == (1, False)
    assert said["reasons"]
    assert said["validation"]["accepted"] == 20_000
    estimated = {row["policy"] for row in said["estimates"] if row["objective"] is None and row["low"] <= row["value"] <= row["high"]}
    assert estimated == {"fastq", "random", "bts"}
    own, other = said["on_policy"]["own rounds"], said["on_policy"]["from the other log"]
    assert own["value"] == pytest.approx(0.0038, abs=1e-9)  # 38 clicks in its 10,000 rounds
    assert other["low"] <= own["value"] <= other["high"]
    run.gone()
