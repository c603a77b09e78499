"""The command line as a user and as a program meet it: exit codes, sentences, and standard output that holds the answer alone."""

import json
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
import yaml

from fastq import cli, terminal
from fastq.cli import answering
from fastq.errors import GateRefused
from fastq.platform import platform_from_tree

COMMANDS = [
    "demo",
    "init",
    "import",
    "validate",
    "retrain",
    "evaluate",
    "benchmark",
    "serve",
    "recommend",
    "explain",
    "query",
    "forget",
    "models",
    "promote",
    "export",
    "rollback",
    "pause",
    "resume",
    "schedule",
    "deploy",
    "monitor",
    "lift",
    "doctor",
    "backup",
    "restore",
    "keys",
]
YAML = """
version: 1
platform: corner
logs: {decisions: decisions.csv}
state: {period: 1d, window: 3}
policies: [early, late]
action:
  kind: continuous
  dimensions: {goal: {low: 0, high: 10, unit: games}}
objectives: {joy: {weight: 1.0}}
"""


def one_document(text):
    """Strict JSON, one document and nothing else."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def corner(tmp_path):
    """300 good decisions of 30 players by two policies, uniform over [0, 10]."""
    rows = [
        (f"d{i}", f"p{i % 30}", f"2026-03-{1 + i // 30:02d}T06:{i % 60:02d}:00Z", "early" if i % 2 else "late", 0.1, (i * 7 % 100) / 10, (i % 5) / 5)
        for i in range(300)
    ]
    names = ["decision_id", "player_id", "decided_at", "policy", "propensity", "goal", "joy"]
    pl.DataFrame(rows, schema=names, orient="row").write_csv(tmp_path / "decisions.csv")
    (tmp_path / "fastq.yaml").write_text(YAML)
    return tmp_path


# ---- standard output -------------------------------------------------------------------------------------------------


def test_only_the_answer_reaches_standard_output(capfd):
    with answering(True) as answer:
        print("a library's print")
        os.write(1, b"a C library's print\n")
        subprocess.run(["echo", "a child's print"], check=True)
        answer({"value": 1.5, "nothing": float("nan")}, lambda _: [])
        print("a farewell")
    print("afterwards")
    out, err = capfd.readouterr()
    assert one_document(out.removesuffix("afterwards\n")) == {"value": 1.5, "nothing": None}
    assert all(said in err for said in ("a library's", "a C library's", "a child's", "a farewell"))


def test_a_refusal_is_a_document_too(capfd):
    with pytest.raises(GateRefused), answering(True):
        raise GateRefused("logs", ["too many bad rows", "no players"])
    assert one_document(capfd.readouterr().out) == {"error": "logs: too many bad rows; no players", "reasons": ["too many bad rows", "no players"]}


def test_people_get_text_and_programs_get_json(capfd):
    with answering(False) as answer:
        answer({"value": 1}, lambda document: [f"value {document['value']}"])
    assert capfd.readouterr().out == "value 1\n"


def test_an_explanation_is_a_table_whose_parts_add_up(capfd):
    part, longer = {"objective": "joy", "horizon": "immediate", "value": 0.25}, {"objective": "joy", "horizon": "long_term", "value": 0.5}
    document = {
        "player_id": "p[1]", "action": {"goal": 7.25}, "model_version": "3", "value": 0.75, "low": 0.5, "high": 1.0, "parts": [part, longer],
        "score": {"value": 0.75, "caution": 0.25, "guardrail": 0.0, "total": 0.5},
        "contrast": {"against": "early", "action": {"goal": 2.0}, "difference": 0.5, "low": 0.25, "high": 0.75,
                     "parts": [longer], "decisive": [["joy", "long_term"]]},
        "what_if": None, "attributions": {"measures": {"games": -0.125}, "periods": [], "completeness_gap": 0.001},
        "evidence": {"nearest": [], "disagreement": 0.02, "policies": ["early"], "verdict": "well supported", "grade": "good"},
    }  # fmt: skip
    with answering(False) as answer:
        answer(document, terminal.explanation)
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert lines[0][:3] == ["p[1]:", "goal", "7.25"]  # somebody's id is no markup
    for row in (["joy", "immediate", "+0.2500"], ["joy", "long", "term", "+0.5000"], ["sum", "+0.7500"], ["sum", "+0.5000"]):
        assert row in lines
    assert ["Enough", "to", "decide", "it:", "joy", "(long", "term)"] in lines


def test_a_validation_in_the_terminal_names_what_failed_and_where_refused_rows_of_any_table_are(capfd):
    rules = [
        {"rule": "decisions.quarantined.share", "failed": 0, "severity": "stop", "passed": True},
        {"rule": "activity.quarantined.share", "failed": 2, "severity": "stop", "passed": True},  # two are allowed
        {"rule": "activity.rounds.min", "failed": 2, "severity": "quarantine", "passed": False},
    ]
    counts = {"accepted": 9, "quarantined": 0, "repeated": 0}
    document = {"passed": True, "rules": rules, **counts, "quarantine": "refused.parquet", "report": "page.html", "reasons": []}
    with answering(as_json=False) as answer:
        answer(document, terminal.validation)
    said = capfd.readouterr().out
    assert "activity.rounds.min" in said
    assert ".share" not in said
    assert "Refused rows with their reasons: refused.parquet" in said


def test_a_model_of_which_no_estimate_may_be_trusted_is_refused(tmp_path):
    platform = platform_from_tree(yaml.safe_load(YAML), tmp_path, "fastq.yaml")
    trusted_rival = {"policy": "early", "objective": None, "verdict": "trust"}
    doubted = {"policy": "corner 3", "objective": None, "verdict": "do not trust: 12 rows count"}
    of_one_objective = {"policy": "corner 3", "objective": "joy", "verdict": "trust"}
    assert cli._nothing_to_trust({"estimates": [trusted_rival, doubted, of_one_objective]}, platform)
    assert not cli._nothing_to_trust({"estimates": [trusted_rival, doubted, {**doubted, "verdict": "trust"}]}, platform)


# ---- usage and configuration: exit 2, one sentence ---------------------------------------------------------------------


def test_every_command_of_the_contract_that_exists_is_listed(fastq, tmp_path):
    listed = fastq("--help", cwd=tmp_path, code=0).stdout.split("Commands:")[1]
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "][: len(COMMANDS)] == COMMANDS


@pytest.mark.parametrize("command", [[name] for name in COMMANDS] + [["keys", "create"], ["keys", "list"], ["keys", "revoke"]], ids=" ".join)
def test_every_command_has_help(command, fastq, tmp_path):
    assert "Usage: fastq" in fastq(*command, "--help", cwd=tmp_path, code=0).stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["validat"], "validate"),
        (["validate", "--jsn"], "--json"),
        (["validate"], "fastq.yaml"),
        (["validate", "--workspace", "nowhere"], "nowhere"),
        (["promote", "3", "--force"], "--reason"),
        (["recommend"], "--all"),
        (["recommend", "p1", "--all"], "--all"),
        (["recommend", "--all"], "--out"),
        (["recommend", "p1", "--out", "x.parquet"], "--out"),
        (["keys", "create", "--role", "king"], "analyst"),
        (["serve", "--port", "0"], "--port"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_is_answered_with_the_mend(arguments, says, fastq, tmp_path):
    answer = fastq(*arguments, cwd=tmp_path, code=2)
    assert says in answer.stderr
    assert answer.stdout == ""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("window: 3", "windw: 3", ["state.windw", "'window'"]),
        ("window: 3", "window: some", ["state.window", "integer"]),
        ("policies: [early, late]", "policies: []", ["policies"]),
        ("decisions.csv", "gone.csv", ["gone.csv"]),
        ("weight: 1.0", "weight: .nan", ["objectives.joy.weight", "finite"]),
        ("low: 0, high: 10", "low: 10, high: 0", ["goal", "low < high"]),
    ],
)
def test_a_configuration_mistake_is_one_sentence_that_names_it(old, new, says, fastq, corner):
    assert old in YAML
    (corner / "fastq.yaml").write_text(YAML.replace(old, new))
    answer = fastq("validate", cwd=corner, code=2)
    *before, sentence = answer.stderr.strip().splitlines()
    assert all(word in sentence for word in says)
    assert before == ([] if "gone.csv" not in new else ["reading and judging the logs"])  # that file is only missed when it is read
    assert answer.stdout == ""


def test_with_json_a_mistake_is_a_document_and_still_a_sentence(fastq, tmp_path):
    answer = fastq("validate", "--json", cwd=tmp_path, code=2)
    assert "fastq.yaml" in one_document(answer.stdout)["error"]
    assert "fastq.yaml" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--against", "nobody"], "early, late"),
        (["--against", "gaol=3"], "goal"),
        (["--against", "goal=much"], "'much'"),
        (["--against", "goal=nan"], "finite"),
        (["--weights", "joy"], "joy"),
        (["--weights", "fun=2"], "joy"),
        (["--weights", "joy=lots"], "'lots'"),
    ],
    ids=" ".join,
)
def test_an_alternative_or_a_weight_that_is_not_there_is_named(arguments, says, fastq, corner):
    assert says in fastq("explain", "p1", *arguments, cwd=corner, code=2).stderr


# ---- the data's own verdict --------------------------------------------------------------------------------------------


def test_good_logs_pass(fastq, corner):
    document = one_document(fastq("validate", "--json", cwd=corner, code=0).stdout)
    assert document["passed"] is True
    assert (document["accepted"], document["quarantined"], document["repeated"]) == (300, 0, 0)
    assert document["rules"]
    assert all({"rule", "failed", "severity"} <= set(rule) for rule in document["rules"])
    assert (corner / document["report"]).stat().st_size > 0


def test_bad_rows_are_refused_with_their_reason_and_too_many_end_with_1(fastq, corner):
    logs = pl.read_csv(corner / "decisions.csv")
    outside = pl.when(pl.col("decision_id").is_in([f"d{i}" for i in range(4)])).then(99.0).otherwise("goal").alias("goal")  # 4 of 300: more than 1 %
    logs.with_columns(outside).write_csv(corner / "decisions.csv")
    document = one_document(fastq("validate", "--json", cwd=corner, code=1).stdout)
    assert document["passed"] is False
    assert (document["accepted"], document["quarantined"]) == (296, 4)
    refused = pl.read_parquet(corner / document["quarantine"])
    assert sorted(refused["decision_id"]) == ["d0", "d1", "d2", "d3"]
    assert all("goal" in reason for reason in refused["reason"])


def test_few_bad_rows_are_refused_and_the_rest_goes_on(fastq, corner):
    logs = pl.read_csv(corner / "decisions.csv")
    logs.with_columns(pl.when(pl.col("decision_id") == "d7").then(0.0).otherwise("propensity").alias("propensity")).write_csv(corner / "decisions.csv")
    said = fastq("validate", cwd=corner, code=0).stdout  # as people read it
    assert all(word in said for word in ("299 accepted", "1 quarantined", "0 repeated", "Passed"))
    assert "propensity" in said


def test_init_writes_a_file_that_validate_takes_and_replaces_none(fastq, corner):
    (corner / "fastq.yaml").unlink()
    one_document(fastq("init", ".", "--decisions", "decisions.csv", "--action", "goal", "--objective", "joy", "--json", cwd=corner, code=0).stdout)
    written = (corner / "fastq.yaml").read_text()
    assert all(word in written for word in ("#", "goal", "joy", "early", "late"))
    assert one_document(fastq("validate", "--json", cwd=corner, code=0).stdout)["accepted"] == 300
    assert "--force" in fastq("init", ".", "--decisions", "decisions.csv", cwd=corner, code=2).stderr
    assert (corner / "fastq.yaml").read_text() == written


# ---- keys and models -----------------------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_can_be_revoked(fastq, corner):
    made = one_document(fastq("keys", "create", "--role", "analyst", "--json", cwd=corner, code=0).stdout)
    assert set(made) == {"id", "key", "role"}
    assert made["role"] == "analyst"
    listed = fastq("keys", "list", "--json", cwd=corner, code=0).stdout
    assert made["key"] not in listed
    assert [(key["id"], key["revoked_at"]) for key in one_document(listed)["keys"]] == [(made["id"], None)]
    fastq("keys", "revoke", made["id"], cwd=corner, code=0)
    assert one_document(fastq("keys", "list", "--json", cwd=corner, code=0).stdout)["keys"][0]["revoked_at"]
    assert "no such key" in fastq("keys", "revoke", "nothing", cwd=corner, code=2).stderr
    assert made["key"].encode() not in b"".join(path.read_bytes() for path in corner.rglob("*") if path.is_file())


def test_a_workspace_without_models_says_so(fastq, corner):
    assert one_document(fastq("models", "--json", cwd=corner, code=0).stdout) == {"models": []}
    assert "fastq retrain" in fastq("models", cwd=corner, code=0).stdout
    assert fastq("promote", "1", cwd=corner, code=(1, 2)).stderr
    assert fastq("recommend", "p1", cwd=corner, code=(1, 2)).stderr


# ---- signals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_unwinds_and_says_which(number, code, tmp_path):
    """A command that works until it is stopped: what it holds is released, and nothing reaches standard output."""
    program = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have it ignored
from fastq import cli
@cli.app.command()
def work() -> None:
    with cli.answering(True):
        try:
            open("begun", "w").close()
            time.sleep(60)
        finally:
            open("released", "w").close()
sys.argv[1:] = ["work"]
cli.main()
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert (tmp_path / "released").exists()
    assert out == ""
    assert err.strip() == f"stopped by {number.name}"
