"""Analysts' SQL: every view against its source, the wall against hostile queries, the limits, the files, and the README's ten questions."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pytest
import yaml
from polars.testing import assert_frame_equal

import fastq as library
from fastq import queries, records, registry
from fastq.errors import RequestError, WorkspaceError
from fastq.explanation import HORIZONS
from fastq.forgetting import remember
from fastq.platform import load_platform, platform_from_tree
from fastq.workspace import Workspace
from serving import online
from serving.decision_log import Event, Reported, now_us, open_log

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory):
    """A copy of the trained workspace that has served since its last validation: (platform, answers, batch, an event)."""
    platform = load_platform(shutil.copytree(trained, tmp_path_factory.mktemp("asked") / "it's a workspace"))
    players = records.read_tables(platform).decisions["player_id"].unique(maintain_order=True).head(6).to_list()
    answers = online.recommend(platform, [*players, "nobody-yet"])["recommendations"]
    ids = [a["decision_id"] for a in answers]
    other = {name: float(low) for name, (low, _) in zip(platform.dimension_names, platform.bounds, strict=True)}
    names = list(platform.objectives)
    event = Event("nobody-yet", now_us() - 5_000_000, {"games": 2.0, "minutes": 31.5})
    log = open_log(platform)
    try:
        log.report([Reported(i, {name: 0.25 * k for k, name in enumerate(names)}) for i in ids[:3]]).result()
        log.report([Reported(ids[0], {names[0]: 0.75})], correct=True).result()
        log.report([Reported(ids[1], {}, executed=False), Reported(ids[2], {}, executed=other)]).result()
        log.record_activity([event]).result()
    finally:
        log.close()
    at = datetime(2026, 3, 1, 6, tzinfo=UTC)
    action = [pl.lit(float(high)).alias(name) for name, (_, high) in zip(platform.dimension_names, platform.bounds, strict=True)]
    batch = pl.DataFrame({"decision_id": ["batch-1"], "player_id": [players[0]], "decided_at": [at], "policy": ["fastq"], "propensity": [0.5]})
    batch = batch.with_columns(*action, model_version=pl.lit("1"), assignment=pl.lit(None, pl.Float64))
    batch.write_parquet(Workspace(platform.root).served / "batch.parquet")
    return platform, answers, batch, event


@pytest.fixture(scope="module")
def sql(served):
    """`sql(text)` gives a Polars frame, as a notebook gets it."""
    connection = library.connect(served[0].root)
    yield lambda text, *values: pl.from_arrow(connection.execute(text, values).to_arrow_table())
    connection.close()


# ---- the views ---------------------------------------------------------------------------------------------------------
def test_every_view_has_the_columns_that_are_documented(served, sql):
    platform = served[0]
    documented = queries.tables(platform)["tables"]
    assert [view["name"] for view in documented] == list(queries.VIEWS)
    for view in documented:
        found = sql(f"DESCRIBE {view['name']}").select("column_name", "column_type").rows()
        assert found == [(c["name"], c["type"]) for c in view["columns"]], view["name"]
        assert all(column["says"] for column in view["columns"])
    units = {c["name"]: c["unit"] for c in documented[0]["columns"]}
    assert {name: units[name] for name in platform.dimension_names} == {name: d.unit for name, d in platform.action.dimensions.items()}


def test_decisions_are_the_accepted_ones_and_those_served_since(served, sql):
    platform, answers, _, _ = served
    accepted = records.read_tables(platform).decisions
    columns = accepted.columns
    logs = sql("SELECT * FROM decisions WHERE origin = 'logs' ORDER BY decision_id")
    assert_frame_equal(logs.select(columns), accepted.sort("decision_id"), check_dtypes=False)
    fresh = sql("SELECT * FROM decisions WHERE origin = 'served' ORDER BY decision_id")
    assert_frame_equal(fresh.select(columns), records.read_served(platform).select(columns).sort("decision_id"), check_dtypes=False)
    assert set(fresh["decision_id"]) == {*(a["decision_id"] for a in answers), "batch-1"}
    assert not fresh["accepted"].any()
    assert logs["accepted"].all()


@pytest.mark.parametrize("away", [False, True])
def test_decisions_served_and_then_validated_stand_once_with_what_came_since(served, tmp_path, away):
    """As the next validation leaves it: the accepted rows of what was served, with an export's value of an objective that nobody reported.

    They lie by themselves; where the server's log was away meanwhile, or an earlier version wrote the tables, among all others.
    """
    platform = load_platform(shutil.copytree(served[0].root, tmp_path / "later"))
    reported, exported = list(platform.objectives)[:2]
    some = records.read_served(platform).filter(pl.col("decision_id") != "batch-1").sort("decided_at", "decision_id")
    known = served[1][0]["decision_id"]
    kept = records.read_tables(platform)
    accepted = kept.decisions
    rows = some.with_columns(pl.lit(9.0).alias(reported), pl.lit(7.0).alias(exported), assignment=pl.lit(0.5)).select(accepted.columns)
    with _logs_away(platform) if away else contextlib.nullcontext():
        _keep(platform, kept, pl.concat([accepted, rows]))
    connection = library.connect(platform.root)
    found = pl.from_arrow(connection.execute("SELECT * FROM decisions WHERE origin = 'served'").to_arrow_table())
    assert connection.execute("SELECT count(*), count(DISTINCT decision_id) FROM decisions").fetchone() == (accepted.height + 8, accepted.height + 8)
    by_id = {row["decision_id"]: row for row in found.to_dicts()}
    undone = served[1][1]["decision_id"]
    assert by_id[known][reported] == 0.75  # what was reported to us stands before what was exported
    assert (by_id[undone][reported], by_id[undone][exported]) == (None, None)  # not carried out, so it teaches nothing
    nothing_reported = served[1][4]["decision_id"]
    assert (by_id[nothing_reported][exported], by_id[nothing_reported]["assignment"]) == (7.0, 0.5)
    assert [by_id[i]["accepted"] for i in (known, "batch-1")] == [True, False]
    connection.close()


def test_what_was_served_is_told_from_the_logs_by_the_validation_and_looked_for_only_where_it_could_not(served, tmp_path, monkeypatch):
    platform = load_platform(shutil.copytree(served[0].root, tmp_path / "copy"))
    kept = records.read_tables(platform)
    some = records.read_served(platform).sort("decided_at", "decision_id").select(kept.decisions.columns)
    whole = pl.concat([kept.decisions, some]).sort("player_id", "decided_at", "decision_id")
    tables = Workspace(platform.root).tables
    looked_for = []
    monkeypatch.setattr(pl, "scan_parquet", lambda path, scan=pl.scan_parquet, **how: looked_for.append(path) or scan(path, **how))

    def found():
        looked_for.clear()
        connection = queries._opened(platform, frozenset({"decisions"}), 512)
        rows = pl.from_arrow(connection.execute("SELECT decision_id, origin, accepted FROM decisions").to_arrow_table())
        connection.close()
        assert set(rows["decision_id"]) == set(whole["decision_id"])
        assert len(rows) == len(whole)
        assert set(rows.filter(pl.col("origin") == "served")["decision_id"]) == set(some["decision_id"])
        return rows.filter(~pl.col("accepted"))["decision_id"].to_list()

    _keep(platform, kept, whole)
    assert_frame_equal(records.read_tables(platform).decisions, whole)
    assert (len(pl.read_parquet(tables / "served.parquet")), len(pl.read_parquet(tables / "decisions.parquet"))) == (len(some), len(kept.decisions))
    assert found() == []
    assert looked_for == []
    with _logs_away(platform):
        _keep(platform, kept, whole)
    assert pl.read_parquet(tables / "served.parquet").is_empty()
    assert found() == []
    assert looked_for
    _keep(platform, kept, whole.filter(pl.col("decision_id") != some["decision_id"][-1]))  # the newest: the logs do not reach so far
    assert found() == [some["decision_id"][-1]]
    assert looked_for == []
    (tables / "served.parquet").unlink()  # an earlier version's
    whole.write_parquet(tables / "decisions.parquet")
    assert_frame_equal(records.read_tables(platform).decisions, whole)
    assert found() == []


def _settled(platform):
    """Every file as if it had been changed a while ago, so that its time of change tells it from what it becomes."""
    for path in Workspace(platform.root).state.rglob("*"):
        if path.is_file() or path.name == "tables":
            then = min(path.stat().st_mtime, time.time()) - 1
            os.utime(path, (then, then))


def test_what_was_served_is_read_anew_only_where_something_changed(served, tmp_path, monkeypatch):
    platform = load_platform(shutil.copytree(served[0].root, tmp_path / "copy"))
    workspace, read = Workspace(platform.root), []
    shutil.rmtree(workspace.state / "queries", ignore_errors=True)
    monkeypatch.setattr(queries, "read_served", lambda asked: read.append(1) or records.read_served(asked))
    first, reported = served[1][3]["decision_id"], next(iter(platform.objectives))

    def asked(by_path=True):
        names = ("decisions", "outcomes", "recommendations", "activity")
        connection = queries._opened(platform, frozenset(names), 512 if by_path else None)
        found = [pl.from_arrow(connection.execute(f"FROM {view} ORDER BY ALL").to_arrow_table()) for view in names]
        connection.close()
        return found

    def kept():
        return sorted(path.name.split("-")[0] for path in (workspace.state / "queries").glob("*-*.parquet"))

    newest = time.time() + 600
    os.utime(workspace.tables / "decisions.parquet", (newest, newest))
    fresh = asked()  # too new to be told from what may come
    assert (len(read), kept()) == (1, [])
    _settled(platform)
    made = asked()
    assert (len(read), kept()) == (2, ["heard", "recommendations", "reported", "served"])
    for again in (asked(), asked(by_path=False)):
        assert len(read) == 2
        for one, other, third in zip(fresh, made, again, strict=True):
            assert_frame_equal(one, other)
            assert_frame_equal(one, third)
    log = open_log(platform)  # a server comes and is told something
    log.report([Reported(first, {reported: 41.0})]).result()
    assert asked()[0].filter(pl.col("decision_id") == first)[reported].to_list() == [41.0]
    _settled(platform)
    asked()
    so_far = len(read)
    log.report([Reported(first, {reported: 42.0})], correct=True).result()  # into a log that is there, and stays open
    assert asked()[0].filter(pl.col("decision_id") == first)[reported].to_list() == [42.0]
    log.close()
    _settled(platform)
    asked()
    assert len(read) > so_far
    so_far = len(read)
    records.write_tables(records.read_tables(platform), workspace)  # a validation
    _settled(platform)
    asked()
    assert len(read) == so_far + 1


def test_of_somebody_forgotten_nothing_is_kept_for_later_questions(served, tmp_path):
    """The player is noted first and struck from the logs last; a question in between must leave no copy behind."""
    platform = load_platform(shutil.copytree(served[0].root, tmp_path / "copy"))
    for player, kept in (("somebody-else", 2), (served[1][0]["player_id"], 0)):
        shutil.rmtree(Workspace(platform.root).state / "queries", ignore_errors=True)
        remember(Workspace(platform.root), player)
        _settled(platform)
        queries._opened(platform, frozenset({"decisions", "outcomes"}), 512).close()
        assert len(list((Workspace(platform.root).state / "queries").glob("*-*.parquet"))) == kept


def test_a_question_over_tables_that_are_replaced_meanwhile_is_asked_again(served, tmp_path, monkeypatch):
    platform = load_platform(shutil.copytree(served[0].root, tmp_path / "copy"))
    workspace = Workspace(platform.root)
    kept = records.read_tables(platform)
    fewer = dataclasses.replace(kept, decisions=kept.decisions.head(5), players=kept.players.head(2))
    opened, times = queries._opened, []

    def meanwhile(*arguments):
        connection = opened(*arguments)
        if not times:
            times.append(1)
            records.write_tables(fewer, workspace)
        return connection

    monkeypatch.setattr(queries, "_opened", meanwhile)
    connection = library.connect(platform.root)
    assert connection.execute("SELECT count(*) FROM decisions WHERE origin = 'logs'").fetchone() == (5,)
    assert connection.execute("SELECT count(*) FROM players").fetchone() == (2,)
    connection.close()
    answers = iter([b'{"truncated": false, "replaced": true}\n', b'{"error": "RequestError", "says": "half of each", "replaced": true}\n'])
    run = subprocess.run
    asked = []

    def answered(*arguments, **options):
        asked.append(1)
        if (head := next(answers, None)) is not None:
            return subprocess.CompletedProcess(arguments, 0, head, b"")
        return run(*arguments, **options)

    monkeypatch.setattr(queries.subprocess, "run", answered)
    assert queries.ask(platform, "SELECT count(*) FROM players").document()["rows"] == [[2]]
    assert len(asked) == queries.ASKED
    answers = iter([b'{"truncated": false, "replaced": true}\n'] * queries.ASKED)
    with pytest.raises(WorkspaceError, match="ask again in a moment"):
        queries.ask(platform, "SELECT count(*) FROM players")


@contextlib.contextmanager
def _logs_away(platform):
    """As if the servers' logs lay on a disk that is not mounted."""
    there, away = Workspace(platform.root).served, platform.root / "away"
    there.rename(away)
    yield
    away.rename(there)


def _keep(platform, kept, decisions):
    records.write_tables(dataclasses.replace(kept, decisions=decisions), Workspace(platform.root))


def test_attributions_are_those_that_explain_gives(served, sql, monkeypatch, tmp_path):
    platform, answers, _, _ = served
    explained = answers[3]["decision_id"]
    single = online.explain(platform, explained)["attributions"]
    rows = sql("SELECT measure, periods_before, value FROM attributions WHERE decision_id = ?", explained).rows()
    assert {measure: value for measure, _, value in rows if measure} == pytest.approx(single["measures"], abs=1e-4)
    periods = {before: value for _, before, value in rows if before}
    assert [periods[platform.state.window - i] for i in range(platform.state.window)] == pytest.approx(single["periods"], abs=1e-4)
    gap = sql("SELECT DISTINCT completeness_gap FROM attributions WHERE decision_id = ?", explained).item()
    assert gap == pytest.approx(single["completeness_gap"], abs=1e-4)
    copy = load_platform(shutil.copytree(platform.root, tmp_path / "copy"))
    shutil.rmtree(Workspace(copy.root).state / "queries" / "attributions")
    monkeypatch.setattr(queries, "ATTRIBUTED", 2)  # the newest first, the others with later questions
    for n in (2, 4):
        found = pl.read_parquet(queries._attributed(copy))["decision_id"].unique()
        assert len(found) == n
    newest = max((a for a in answers if a["value"] is not None), key=lambda a: a["decided_at"])
    assert newest["decision_id"] in found


def test_outcomes_are_the_known_objectives_long(served, sql):
    platform, answers, _, _ = served
    wide = records.read_tables(platform).decisions
    found = sql("SELECT objective, count(*) AS n, sum(value) AS s FROM outcomes WHERE recorded_at IS NULL GROUP BY objective")
    assert {(o, n): s for o, n, s in found.rows()} == pytest.approx({(o, wide[o].count()): wide[o].sum() for o in platform.objectives})
    first, names = answers[0]["decision_id"], list(platform.objectives)
    reported = sql("SELECT objective, value, recorded_at FROM outcomes WHERE decision_id = ?", first)
    assert {o: v for o, v, _ in reported.rows()} == {name: 0.25 * k for k, name in enumerate(names)} | {names[0]: 0.75}
    assert all(datetime.now(UTC) - at < timedelta(hours=1) for at in reported["recorded_at"])
    assert sql("SELECT count(*) FROM outcomes WHERE decision_id = ?", answers[1]["decision_id"]).item() == 0  # it was not carried out


def test_recommendations_are_the_answers_that_were_given(served, sql):
    platform, answers, batch, _ = served
    by_id = {row["decision_id"]: row for row in sql("FROM recommendations").to_dicts()}
    for answer in answers:
        row = by_id[answer["decision_id"]]
        assert {name: row[name] for name in platform.dimension_names} == answer["action"]  # as served, whatever was executed
        same = ("player_id", "policy", "propensity", "model_version", "value", "degraded")
        assert {name: row[name] for name in same} == {name: answer[name] for name in same}
        assert row["decided_at"] == datetime.fromisoformat(answer["decided_at"])
        assert (row["explore"], row["source"]) == (True, "endpoint")
    said = [by_id[a["decision_id"]]["carried_out"] for a in answers[:4]]
    assert said == [None, "not at all", "otherwise", None]
    assert (by_id["batch-1"]["source"], by_id["batch-1"]["propensity"], by_id["batch-1"]["value"]) == ("batch", 0.5, None)
    assert len(by_id) == len(answers) + batch.height


def test_explanations_are_those_that_explain_gives(served, sql):
    platform, answers, _, _ = served
    explained = answers[3]
    for against in (None, *platform.policies):
        single = online.explain(platform, explained["decision_id"], against=against)
        wanted = {(p["objective"], p["horizon"]): p["value"] for p in (single["contrast"]["parts"] if against else single["parts"])}
        rows = sql(
            "SELECT objective, horizon, value FROM explanations WHERE decision_id = ? AND against IS NOT DISTINCT FROM ?", explained["decision_id"], against
        )
        assert {(o, h): v for o, h, v in rows.rows()} == pytest.approx(wanted, abs=1e-5)
        assert len(rows) == len(platform.objectives) * len(HORIZONS)
        about = "SELECT DISTINCT * EXCLUDE (objective, horizon, value, decisive) FROM explanations WHERE decision_id = ? AND against IS NOT DISTINCT FROM ?"
        (together,) = sql(about, explained["decision_id"], against).to_dicts()  # the same beside each part
        of, evidence = single["contrast"] or single, single["evidence"]
        numbers = {name: of[name] for name in ("low", "high")} | {name: single["score"][name] for name in ("caution", "guardrail")}
        numbers |= {name: evidence[name] for name in ("width", "disagreement")}
        numbers["distance"] = sum(one["distance"] for one in evidence["nearest"]) / len(evidence["nearest"])
        assert {name: together[name] for name in numbers} == pytest.approx(numbers, abs=1e-5)
        assert (together["policies"], together["verdict"]) == (evidence["policies"], evidence["verdict"])
        decisive = sql("SELECT objective, horizon FROM explanations WHERE decisive AND decision_id = ? AND against = ?", explained["decision_id"], against)
        assert set(decisive.rows()) == {tuple(reason) for reason in (single["contrast"] or {}).get("decisive", [])}
    assert sql("SELECT count(*) FROM explanations WHERE (against IS NULL) != (decisive IS NULL)").item() == 0
    assert sql("SELECT count(*) FROM explanations WHERE decisive").item() > 0
    added = sql("SELECT decision_id, sum(value) FROM explanations WHERE against IS NULL GROUP BY 1")
    valued = {a["decision_id"]: a["value"] for a in answers if a["value"] is not None}
    assert {i: v for i, v in added.rows() if i in valued} == pytest.approx(valued, rel=1e-5)
    assert "batch-1" not in set(added["decision_id"])  # a batch keeps no state to explain from


def test_explanations_are_kept_and_follow_the_log(served, tmp_path, monkeypatch):
    platform = load_platform(shutil.copytree(served[0].root, tmp_path / "copy"))
    before = pl.read_parquet(queries._explained(platform))
    with monkeypatch.context() as patched:
        patched.setattr(queries, "_parts", lambda *_: pytest.fail("explained again"))
        assert_frame_equal(pl.read_parquet(queries._explained(platform)), before)
    new = online.recommend(platform, [served[1][0]["player_id"]])["recommendations"][0]["decision_id"]
    assert set(pl.read_parquet(queries._explained(platform))["decision_id"]) - set(before["decision_id"]) == {new}
    for log in Workspace(platform.root).served.glob("*.db*"):
        log.unlink()
    assert pl.read_parquet(queries._explained(platform)).is_empty()  # nothing is left of decisions that are gone


def test_explanations_stand_in_files_of_bounded_size(served, tmp_path, monkeypatch):
    """The newest first, so many in one go; a file that is damaged or an earlier version's is made anew, and all are read together."""
    platform = load_platform(shutil.copytree(served[0].root, tmp_path / "copy"))
    whole = pl.read_parquet(queries._explained(platform)).sort(pl.all())
    ids = whole["decision_id"].unique()
    shutil.rmtree(Workspace(platform.root).state / "queries" / "explanations")
    monkeypatch.setattr(queries, "CHUNK", 2)
    monkeypatch.setattr(queries, "EXPLAINED", 3)
    newest = max((a for a in served[1] if a["value"] is not None), key=lambda a: a["decided_at"])
    found = pl.read_parquet(queries._explained(platform))["decision_id"].unique()
    assert len(found) == 3 < len(ids)
    assert newest["decision_id"] in found
    for _ in range(len(ids)):
        files = queries._explained(platform)
    assert len(files) == -(-len(ids) // 2)
    assert_frame_equal(pl.read_parquet(files).sort(pl.all()), whole, rel_tol=1e-5)
    with library.connect(platform.root) as connection:
        assert connection.execute("SELECT count(*) FROM explanations").fetchone() == (whole.height,)
    files[0].write_bytes(b"half of it")
    pl.read_parquet(files[1]).drop("verdict").write_parquet(files[1])
    for _ in range(2):
        assert all(pl.read_parquet_schema(path) == whole.schema for path in queries._explained(platform))
    assert pl.read_parquet(queries._explained(platform))["decision_id"].n_unique() == len(ids)


def test_players_and_activity_are_the_accepted_ones_and_what_was_heard_since(served, sql):
    platform, _, _, event = served
    tables = records.read_tables(platform)
    assert_frame_equal(sql("FROM players ORDER BY player_id"), tables.players.sort("player_id"), check_dtypes=False)
    found = sql("FROM activity")
    assert found.height == tables.activity.collect().height + 1
    heard = found.filter(pl.col("player_id") == event.player_id).row(0, named=True)
    assert {name: heard[name] for name in event.body} == event.body
    assert heard["occurred_at"] == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=event.occurred_at)
    assert sql("SELECT sum(games) FROM activity").item() == pytest.approx(tables.activity.collect()["games"].sum() + event.body["games"])


def test_an_event_that_was_exported_again_is_one(served, tmp_path):
    platform = load_platform(shutil.copytree(served[0].root, tmp_path / "copy"))
    path, event = Workspace(platform.root).tables / "activity.parquet", served[3]
    accepted = pl.read_parquet(path)
    with library.connect(platform.root) as connection:
        row = pl.from_arrow(connection.execute("FROM activity WHERE player_id = ?", [event.player_id]).to_arrow_table())
    pl.concat([accepted, row.select(pl.col(name).cast(kind) for name, kind in accepted.schema.items())]).write_parquet(path)
    with library.connect(platform.root) as connection:
        assert connection.execute("SELECT count(*) FROM activity").fetchone() == (accepted.height + 1,)


def test_models_and_estimates_are_the_registry_s(served, sql):
    platform = served[0]
    known = registry.models(platform)
    rows = sql("FROM models").to_dicts()
    assert [(r["version"], r["aliases"], r["verdict"]) for r in rows] == [(m["version"], m["aliases"], m["verdict"]) for m in known]
    assert rows[0]["created_at"] == datetime.fromisoformat(known[0]["created_at"])
    report = registry.verify(registry.fetch(platform))["details"]["evaluation"]["estimates"]
    found = sql("SELECT policy, objective, estimator, value, low, high, ess, verdict FROM estimates").rows()
    assert found == [tuple(row[name] for name in ("policy", "objective", "estimator", "value", "low", "high", "ess", "verdict")) for row in report]


# ---- the wall ------------------------------------------------------------------------------------------------------------
HOSTILE = [
    "INSERT INTO decisions SELECT * FROM decisions",
    "DELETE FROM decisions",
    "CREATE TABLE t AS SELECT 1",
    "DROP VIEW decisions",
    "ATTACH '{inside}/keys.db'",
    "COPY decisions TO '{outside}/stolen.csv'",
    "COPY (SELECT 1 AS a) TO '{inside}/tables/decisions.parquet' (FORMAT parquet, USE_TMP_FILE false)",
    "EXPORT DATABASE '{outside}/stolen'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "PRAGMA version",
    "/* SELECT */ PRAGMA table_info('decisions')",
    "SET memory_limit = '100GB'",
    "RESET lock_configuration",
    "CALL enable_logging()",
    "EXPLAIN ANALYZE COPY decisions TO '{outside}/stolen.csv'",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY decisions TO '{outside}/stolen.csv'",
    "PREPARE p AS SELECT 1",
    "",
    "-- nothing",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM read_text('{outside}/secret.txt')",
    "SELECT * FROM read_blob('/proc/self/environ')",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM glob('{inside}/*')",
    "SELECT * FROM read_blob('{inside}/keys.db')",
    "SELECT * FROM read_parquet('https://example.com/x.parquet')",
    "SELECT * FROM sqlite_scan('{inside}/keys.db', 'keys')",
    "SELECT getenv('HOME')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM platform",  # a variable of the program around it
    "SELECT * FROM enable_logging(storage = 'file', storage_path = '{outside}/log.csv')",
    'SELECT * FROM decisions, (SELECT * FROM system.main."Enable_Logging"())',
    "SELECT write_log('nothing')",
    "FROM force_checkpoint()",
    "FROM query('FROM enable_logging()')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('FROM enable_logging()'))",
]


@pytest.mark.parametrize("number", range(len(HOSTILE)), ids=lambda i: HOSTILE[i][:40] or "empty")
def test_a_hostile_query_is_refused_in_a_sentence_and_changes_nothing(number, served, tmp_path):
    """As `ask` opens and judges it, in this process; that the process of its own does the same is the next test."""
    platform = served[0]
    inside = Workspace(platform.root).state
    (tmp_path / "secret.txt").write_text("secret")
    text = HOSTILE[number].format(outside=tmp_path, inside=str(inside).replace("'", "''"))
    table = inside / "tables" / "decisions.parquet"
    before = table.stat().st_mtime_ns, table.stat().st_size
    connection = queries._opened(platform, frozenset({"decisions"}), 512)

    def run():
        queries._only_a_select(connection, text)
        return queries._run(connection, text, 10, 512)

    with pytest.raises(RequestError) as refused:
        run()
    assert str(refused.value).startswith(("expected one SELECT", "DuckDB:"))
    assert "\n" not in str(refused.value)
    assert (table.stat().st_mtime_ns, table.stat().st_size) == before
    assert [p.name for p in tmp_path.iterdir()] == ["secret.txt"]
    connection.close()


@pytest.mark.parametrize(
    "text", ["SELECT * FROM read_text('/etc/passwd')", "COPY (SELECT 1) TO '/tmp/fastq-stolen.csv'", "SELEC 1", "SELECT nothing FROM decisions"]
)
def test_the_process_of_its_own_refuses_too(text, served):
    with pytest.raises(RequestError, match=r"expected one SELECT|DuckDB: "):
        queries.ask(served[0], text)
    assert not Path("/tmp/fastq-stolen.csv").exists()


def test_a_notebook_s_connection_cannot_write_or_reach_out_either(served, tmp_path):
    platform = served[0]
    table = Workspace(platform.root).tables / "decisions.parquet"
    before = table.stat().st_mtime_ns
    place = str(table).replace("'", "''")
    with library.connect(platform.root) as connection:
        for text in (
            "CREATE TABLE t AS SELECT 1",
            f"COPY (SELECT 1 AS a) TO '{place}' (FORMAT parquet, USE_TMP_FILE false)",
            f"COPY decisions TO '{tmp_path}/x.csv'",
            f"ATTACH '{tmp_path}/x.db'",
            "SELECT * FROM read_text('/etc/passwd')",
            "SET enable_external_access = true",
            "SET threads = 1",
            "LOAD httpfs",
            "SELECT * FROM platform",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(text).fetchall()
        assert connection.sql("SELECT count(*) AS n FROM decisions").pl().item() > 0
    assert table.stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == []


def test_selects_of_every_kind_are_answered(served):
    connection = queries._opened(served[0], frozenset(queries.VIEWS), 512)
    for text in (
        "FROM decisions LIMIT 1",
        "VALUES (1)",
        "WITH a AS (SELECT 1) FROM a",
        "DESCRIBE decisions",
        "SHOW TABLES",
        "SUMMARIZE decisions",
        "SELECT 1;",
    ):
        queries._only_a_select(connection, text)
        assert queries._run(connection, text, 100, 512)[0][0].num_rows, text
    connection.close()


# ---- the limits ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("SELECT count(*) FROM range(10000000) a, range(10000000) b", "longer than 2 seconds"),
        ("WITH RECURSIVE t AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM t) SELECT count(*) FROM t", "longer than 2 seconds"),
        ("SELECT levenshtein(repeat('x', 200000), repeat('y', 200000))", "longer than 2 seconds"),  # deaf to DuckDB's interrupt for a minute
        ("SELECT array_agg(range) FROM range(1000000000)", "more than 256 MB"),
        ("SELECT length(repeat('x', 1000000000) || repeat('y', 1000000000))", "more than 256 MB"),  # unknown to DuckDB's memory limit
    ],
)
def test_limits_bite_with_a_sentence(text, says, served):
    started = time.monotonic()
    with pytest.raises(RequestError, match=says):
        queries.ask(served[0], text, seconds=2 if "seconds" in says else 60, megabytes=256)
    assert time.monotonic() - started < (20 if "seconds" in says else 60)


def test_an_answer_is_limited_in_bytes_and_rows_and_it_is_said(served):
    with pytest.raises(RequestError, match="larger than 64 MB"):
        queries.ask(served[0], "SELECT repeat('x', 1000000) FROM range(100)")
    answer = queries.ask(served[0], "SELECT range AS i FROM range(1000000000000)", rows=3_000)
    assert (answer.table.num_rows, answer.truncated) == (3_000, True)
    assert answer.table["i"].to_pylist() == list(range(3_000))
    answer = queries.ask(served[0], "SELECT range AS i FROM range(3000)", rows=3_000)
    assert (answer.table.num_rows, answer.truncated) == (3_000, False)
    answer = queries.ask(served[0], "SELECT range AS i FROM range(0)")
    assert answer.document() == {"columns": ["i"], "rows": [], "truncated": False}


def test_every_type_has_a_json_value(served):
    text = """SELECT 'nan'::DOUBLE, '-infinity'::DOUBLE, 1.5::DECIMAL(9, 2), sum(range), 1::HUGEINT << 100, DATE '2026-03-01',
        TIMESTAMPTZ '2026-03-01 08:00:00+02', TIMESTAMP '2026-03-01 06:00:00.5', 'infinity'::TIMESTAMP, INTERVAL 3 DAY, [1, NULL], {'a': 'nan'::FLOAT},
        'x'::BLOB, true, NULL, TIME '10:00' FROM range(4)"""
    document = queries.ask(served[0], text).document()
    wanted = [None, None, 1.5, 6, str(2**100), "2026-03-01", "2026-03-01T06:00:00Z", "2026-03-01T06:00:00.500000Z", None, "P0M3DT0S"]
    assert document["rows"] == [[*wanted, [1, None], {"a": None}, "eA==", True, None, "10:00:00"]]
    json.dumps(document, allow_nan=False)


# ---- the command line ------------------------------------------------------------------------------------------------------
def test_the_command_answers_as_json_csv_parquet_and_table(served, fastq, tmp_path):
    root = served[0].root
    text = "SELECT policy, count(*) AS n, avg(cost) AS cost, min(decided_at) AS first FROM decisions GROUP BY policy ORDER BY policy"
    document = json.loads(fastq("query", text, "--json", cwd=root, code=0).stdout)
    assert document["columns"] == ["policy", "n", "cost", "first"]
    assert document["truncated"] is False
    with library.connect(root) as connection:
        wanted = [list(row) for row in connection.execute(text.replace("min(decided_at)", "strftime(min(decided_at), '%Y-%m-%dT%H:%M:%S')")).fetchall()]
    assert [[p, n, c, f[:19]] for p, n, c, f in document["rows"]] == wanted
    assert all(row[3].endswith("Z") for row in document["rows"])

    rows = list(csv.reader(io.StringIO(fastq("query", text, "--csv", cwd=root, code=0).stdout)))
    assert rows == [document["columns"], *[[str(value) for value in row] for row in document["rows"]]]

    limited = fastq("query", "FROM decisions", "--parquet", tmp_path / "out.parquet", "--limit", "7", cwd=root, code=0)
    assert pl.read_parquet(tmp_path / "out.parquet").height == 7
    assert "--limit" in limited.stderr

    shown = fastq("query", "SELECT '[red]x' AS a, NULL AS b", cwd=root, code=0).stdout
    assert "[red]x" in shown


def test_the_command_lists_the_views(served, fastq):
    platform = served[0]
    assert json.loads(fastq("query", "--tables", "--json", cwd=platform.root, code=0).stdout) == queries.tables(platform)
    shown = fastq("query", "--tables", cwd=platform.root, code=0).stdout
    assert all(name in shown for name in queries.VIEWS)
    assert "INR" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["SELECT * FROM decision"], "there are decisions, outcomes"),
        (["SELECT * FROM read_csv('/etc/passwd')"], "Permission Error"),
        (["DROP VIEW decisions"], "expected one SELECT"),
        ([], "--tables"),
        (["SELECT 1", "--tables"], "--tables"),
        (["SELECT 1", "--csv", "--json"], "--csv"),
        (["SELECT 1", "--limit", "0"], "--limit"),
        (["SELECT 1", "--parquet", "no/such/place.parquet/x"], "place.parquet"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(arguments, says, served, fastq, tmp_path):
    (tmp_path / "no").write_text("a file")  # where a directory would have to be
    ended = fastq("query", "--workspace", served[0].root, *arguments, cwd=tmp_path, code=2)
    assert says in ended.stderr + ended.stdout


def test_without_accepted_logs_the_mend_is_named(served, fastq, tmp_path):
    shutil.copy(served[0].root / "fastq.yaml", tmp_path)
    assert "fastq retrain" in fastq("query", "SELECT * FROM decisions", cwd=tmp_path, code=2).stderr
    with pytest.raises(WorkspaceError, match="fastq retrain"):
        library.connect(tmp_path)
    assert queries.ask(load_platform(tmp_path), "SELECT count(*) FROM recommendations").document()["rows"] == [[0]]


def test_tables_of_another_platform_file_are_refused(served, tmp_path):
    root = shutil.copytree(served[0].root, tmp_path / "copy")
    file = root / "fastq.yaml"
    tree = yaml.safe_load(file.read_text())
    tree["objectives"]["joy"] = {"weight": 1.0}
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(WorkspaceError, match=r"joy.*fastq retrain"):
        queries.ask(load_platform(root), "SELECT 1 FROM decisions")


# ---- other platforms -------------------------------------------------------------------------------------------------------
def test_a_catalogue_whose_objectives_have_our_names(tmp_path):
    tree = {
        "platform": "shop", "logs": {"decisions": "d.parquet"}, "state": {"period": "1d", "window": 2}, "policies": ["a", "b"],
        "action": {"kind": "catalogue"}, "objectives": {"value": {}, "origin": {"weight": -2, "ceiling": 0.5}, 'o"dd': {}},
    }  # fmt: skip
    rows = [("d1", "p1", "2026-03-01T00:00:00Z", "a", 0.5, "x", 1.5, None, 0.0), ("d2", "p2", "2026-03-02T00:00:00Z", "b", None, "y", math.inf, 2.0, 1.0)]
    names = ["decision_id", "player_id", "decided_at", "policy", "propensity", "item_id", "value", "origin", 'o"dd']
    pl.DataFrame(rows, schema=names, orient="row").write_parquet(tmp_path / "d.parquet")
    platform = platform_from_tree(tree, tmp_path, "fastq.yaml")
    records.write_tables(records.read_records(platform), Workspace(tmp_path))
    (tmp_path / "fastq.yaml").write_text(yaml.safe_dump(tree))
    wanted = frozenset({"decisions", "outcomes", "players", "recommendations", "activity", "explanations"})
    connection = queries._opened(platform, wanted, 256)
    assert connection.execute('SELECT decision_id, item_id, value, origin, "o""dd", origin_, accepted FROM decisions').fetchall() == [
        ("d1", "x", 1.5, None, 0.0, "logs", True)
    ]
    assert sorted(connection.execute("SELECT objective, value FROM outcomes").fetchall()) == [('o"dd', 0.0), ("value", 1.5)]
    assert connection.execute("FROM players").fetchall() == [("p1", None)]
    for empty in ("recommendations", "activity", "explanations"):
        assert connection.execute(f"SELECT count(*) FROM {empty}").fetchone() == (0,)
    says = {c["name"]: (c["unit"], c["says"]) for c in queries.tables(platform)["tables"][0]["columns"]}
    assert says["propensity"][0] == "probability"
    assert "weight -2" in says["origin"][1]
    assert "ceiling 0.5" in says["origin"][1]


# ---- the README's questions --------------------------------------------------------------------------------------------------
SECTION = README.read_text(encoding="utf-8").split("## Ask in SQL")[1].split("\n## ")[0]
QUESTIONS = re.findall(r"\*\*([^*]+(?:\*\w+\*[^*]+)?\?)\*\*.*?```sql\n(.*?)```", SECTION, re.DOTALL)


def test_there_are_ten_questions():
    assert len(QUESTIONS) == SECTION.count("```sql") == 10


@pytest.mark.parametrize("number", range(len(QUESTIONS)), ids=lambda i: QUESTIONS[i][0][:50])
def test_the_readme_s_queries_answer(number, served):
    question, text = QUESTIONS[number]
    connection = queries._opened(served[0], queries._named(text), 512)
    queries._only_a_select(connection, text)
    batches, _ = queries._run(connection, text, 1_000, 512)
    assert sum(batch.num_rows for batch in batches) > 0, question
    connection.close()


def test_the_first_question_s_answer_is_what_the_numbers_say(served, sql):
    """Worked again from the tables in Polars."""
    platform = served[0]
    found = {row["region"]: row for row in sql(QUESTIONS[0][1]).to_dicts()}
    decisions = sql("FROM decisions").join(records.read_tables(platform).players, on="player_id")
    week = decisions.filter(pl.col("decided_at") > decisions["decided_at"].max() - timedelta(days=7))
    parts = sql("FROM explanations").filter(pl.col("objective") == "cost", pl.col("horizon") == "immediate", pl.col("against").is_not_null())
    for (region,), rows in week.group_by("region"):
        assert found[region]["paid"] == pytest.approx(rows["cost"].mean(), nan_ok=True) or rows["cost"].mean() is None
        saved = parts.join(rows, on="decision_id").group_by("against").agg(-pl.col("value").mean()).filter(pl.col("value") > 0).sort("value")
        assert found[region]["would_pay_less"] == (saved["against"][-1] if len(saved) else None)
    assert set(found) == set(week["region"])
    assert any(row["would_pay_less"] for row in found.values())
