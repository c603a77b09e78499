"""Analysts' SQL: DuckDB over views of what was decided, what followed, why, and what is known of players and models.

The views are laid over the accepted tables (Parquet, scanned in place) and over what was served since (SQLite, batches), so both are seen
at once. They are made before the caller's SQL is read; then the wall is shut with DuckDB's own locks: no file but the tables, no network,
no extension, no setting, and one statement that DuckDB's own parser takes for a SELECT. DuckDB's memory limit knows nothing of what single
functions allocate, and an interrupt waits for them (measured: 4 GB under a limit of 0.5, 88 s under one of 3), so `ask` runs in a
process of its own, whose memory and time the system limits.
"""

from __future__ import annotations

import base64
import contextlib
import glob
import hashlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time as clock
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from fastq.errors import BundleError, FastqError, RequestError, WorkspaceError
from fastq.forgetting import forgotten
from fastq.platform import Platform, format_duration, load_platform
from fastq.records import decision_logs, json_fields, put_back, read_served, reading_log, served_log, written
from fastq.sources import TIME
from fastq.workspace import Workspace, replacing, settled

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

    from fastq.features import PlayerStates
    from fastq.policy import Policy

logger = logging.getLogger("fastq.queries")
MOST_ROWS = 10_000  # of an answer, unless more are asked for
MOST_SECONDS = 60  # that a query may run
MOST_MEGABYTES = 1_024  # that a query may hold in memory
MOST_BYTES = 64 * 2**20  # of an answer
ASKED = 3  # times that a question is asked at most, where the accepted logs are replaced while it is answered
OVERHEAD = 512 * 2**20  # address space that threads and the answer take beside the query's own memory
CHUNK = 4_096  # decisions explained at a time, and in one file
EXPLAINED = 50_000  # decisions, the newest, that one question explains at most, those of earlier questions left aside
ATTRIBUTED = 1_000  # decisions, the newest, that one question finds attributions for at most: each costs about 10 ms
FORM = 1  # of what is kept of what was served; another number wherever something else is made of the same logs
DEEDS = frozenset(  # functions that a SELECT may call and that do something, or run a text that nobody parsed here
    {
        *("enable_logging", "disable_logging", "truncate_duckdb_logs", "write_log", "enable_profiling", "disable_profiling"),
        *("checkpoint", "force_checkpoint", "query", "json_execute_serialized_sql"),
    }
)
STRAY = "?stray"  # column: among the accepted decisions too, though the validation did not know that it was served
WHOLE_CATALOGUE = ("query", "information_schema", "duckdb_", "show", "pg_")  # words of queries that may read views without naming them

_EXPLAINED = {
    "decision_id": pl.String(),
    "model_version": pl.String(),
    "objective": pl.String(),
    "horizon": pl.String(),
    "against": pl.String(),
    "value": pl.Float64(),
    "decisive": pl.Boolean(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "width": pl.Float64(),
    "caution": pl.Float64(),
    "guardrail": pl.Float64(),
    "disagreement": pl.Float64(),
    "distance": pl.Float64(),
    "policies": pl.List(pl.String()),
    "grade": pl.String(),
    "verdict": pl.String(),
}

_ATTRIBUTED = {
    "decision_id": pl.String(),
    "model_version": pl.String(),
    "measure": pl.String(),
    "periods_before": pl.Int64(),
    "value": pl.Float64(),
    "completeness_gap": pl.Float64(),
}


# ---- what the views hold -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Column:
    """One column of a view: its DuckDB type, its unit (empty where it has none), and a sentence."""

    name: str
    type: str
    unit: str
    says: str


@dataclass(frozen=True)
class View:
    """One view: what a row of it is, and its columns in order."""

    name: str
    says: str
    columns: list[Column]


VIEWS = ("decisions", "outcomes", "recommendations", "explanations", "attributions", "players", "activity", "models", "estimates")


def views(platform: Platform) -> dict[str, View]:
    """Every view of this platform with its columns, units and meanings, out of the platform file."""
    text, number, moment, flag = "VARCHAR", "DOUBLE", "TIMESTAMP WITH TIME ZONE", "BOOLEAN"
    decision = Column("decision_id", text, "", "the decision")
    player = Column("player_id", text, "", "the player")
    about = [decision, player, Column("decided_at", moment, "UTC", "when it was decided"), Column("policy", text, "", "the policy that acted")]
    version = Column("model_version", text, "", "the model that decided, null if none did")
    law = Column("propensity", number, _propensity_unit(platform), "of the executed action under the policy that acted, null if not known")
    action, objectives = _action_columns(platform), [Column(name, number, "its own", _objective_says(platform, name)) for name in platform.objectives]
    share = Column("assignment", number, "probability", "with which this policy was chosen to act, null if not known")
    taken = {column.name for column in (*action, *objectives)}
    weighted = "weighted objectives"

    def ours(name: str, kind: str, unit: str, says: str) -> Column:
        return Column(f"{name}_" if name in taken else name, kind, unit, says)  # a platform may have an objective of this name

    measures = [Column(n, number, "its own", f"one event's value; a period has their {m.aggregate}") for n, m in platform.state.measures.items()]
    attributes = [Column(n, number if a.kind == "numeric" else text, "", f"{a.kind} attribute") for n, a in platform.state.attributes.items()]
    found = [
        View(
            "decisions",
            "one decision as it was carried out: the accepted logs, and whatever fastq served since",
            [
                *about, law, share, version, *action, *objectives,
                ours("origin", text, "", "'served' by fastq, or from the platform's own 'logs'"),
                ours("accepted", flag, "", "whether the last validation accepted it, so that training has it"),
            ],
        ),
        View(
            "outcomes",
            "one known objective of one decision; a decision that was not carried out has none",
            [
                decision, Column("objective", text, "", f"one of {', '.join(platform.objectives)}"),
                Column("value", number, "that objective's", "the immediate value, unweighted"),
                Column("recorded_at", moment, "UTC", "when it was reported to fastq, null if it came with the logs"),
            ],
        ),
        View(
            "recommendations",
            "one decision that fastq served, as it was answered",
            [
                *about, version, *action, law,
                ours("value", number, weighted, "expected discounted sum of this action, null if no model chose it or a batch did not keep it"),
                ours("explore", flag, "", "whether the action was drawn with noise, null in batches"),
                ours("exploration", number, "share of each range", "scale of that noise, null if no model chose"),
                ours("degraded", text, "", "why the answer did not rest on a fresh, known state; null if it did"),
                ours("carried_out", text, "", "'as served', 'otherwise' or 'not at all'; null if nothing was reported"),
                ours("source", text, "", "'endpoint' (also the command line) or 'batch'"),
            ],
        ),
        View(
            "explanations",
            "one part of the value of one served decision, by its model and state of then, beside what is said of all parts of that decision and `against`"
            f" together; of the {EXPLAINED:,} newest, and those of earlier questions; none where the state was not kept or the model cannot be read",
            [
                decision, Column("model_version", text, "", "the model whose parts these are"), Column("objective", text, "", "which objective"),
                Column("horizon", text, "", "'immediate' or 'long_term'"),
                Column("against", text, "", f"null: parts of the action itself; {', '.join(platform.policies)}: less those of what this policy would do"),
                Column("value", number, weighted, "objective times its weight; the parts of one decision and one `against` add up"),
                Column("decisive", flag, "", "whether it is among the fewest parts that outweigh every drawback; null where `against` is"),
                Column("low", number, weighted, "lower end of the 90 % interval of the parts' sum"), Column("high", number, weighted, "upper end"),
                Column("width", number, "times the usual", "of the difference's interval, to the likeliest policy's action where `against` is null"),
                Column("caution", number, weighted, "subtracted for doubt before actions were ranked"),
                Column("guardrail", number, weighted, "subtracted for guardrails before actions were ranked"),
                Column("disagreement", number, weighted, "of the two critics about the value"),
                Column("distance", number, "times the usual", "mean distance of the nearest logged decisions' states; null if too few were kept"),
                Column("policies", f"{text}[]", "", "who acts in at least 1 of 20 such states"),
                Column("grade", text, "", "of the evidence: 'ample', 'good', 'fair', 'thin' or 'very thin'"),
                Column("verdict", text, "", "'well supported', or 'thin: ' and why"),
            ],
        ),
        View(
            "attributions",
            f"what one measure, or one period, moved the value of a served decision; of the {ATTRIBUTED:,} newest, and those of earlier questions",
            [
                decision, Column("model_version", text, "", "the model whose value was moved"),
                Column("measure", text, "", "a measure, or 'previous' and an action dimension or objective, over all periods; null: a period's sum"),
                Column("periods_before", "BIGINT", format_duration(platform.state.period), "before the decision, 1 the one before it; null: a measure's sum"),
                Column("value", number, weighted, "against the same player with nothing known of the history"),
                Column("completeness_gap", number, weighted, "what the measures together, and the periods together, leave of the value's movement"),
            ],
        ),
        View(
            "players",
            "one version of a player's attributes" if platform.logs.players else "one player who occurs in the decisions; there is no players log",
            [player, Column("valid_from", moment, "UTC", "from when on, null: always"), *attributes],
        ),
        View(
            "activity",
            "one event: the accepted log, and what came over HTTP since" if platform.logs.activity else "empty, for fastq.yaml names no activity log",
            [
                player, Column("occurred_at", moment, "UTC", "when it happened"),
                Column("known_at", moment, "UTC", "when it became known; decisions before that do not see it"), *measures,
            ],
        ),
        View(
            "models",
            "one registered version",
            [
                Column("version", text, "", "as model_version elsewhere"), Column("aliases", f"{text}[]", "", "champion is what is served"),
                Column("created_at", moment, "UTC", "when it was registered"), Column("verdict", text, "", "what the gate said, with its reasons"),
            ],
        ),
        View(
            "estimates",
            "one off-policy estimate, made when a version was trained, on held-out players",
            [
                Column("model_version", text, "", "the version that was judged"),
                Column("policy", text, "", "whose value: fastq is that version, the others are what it was held against"),
                Column("objective", text, "", "null: the weighted sum"), Column("estimator", text, "", "how it was estimated"),
                Column("value", number, "discounted sum", "per decision, if this policy alone acts from then on; the objective's unit, or weighted"),
                Column("low", number, "discounted sum", "lower end of the interval"), Column("high", number, "discounted sum", "upper end"),
                Column("ess", number, "rows", "rows that really count"), Column("verdict", text, "", "whether it may be trusted"),
            ],
        ),
    ]  # fmt: skip
    return {view.name: view for view in found}


def tables(platform: Platform) -> dict[str, Any]:
    """`fastq query --tables --json`: `tables: [{name, says, columns: [{name, type, unit, says}]}]`."""
    return {"tables": [asdict(view) for view in views(platform).values()]}


def _action_columns(platform: Platform) -> list[Column]:
    if platform.action.kind == "catalogue":
        return [Column("item_id", "VARCHAR", "", "the item")]
    return [
        Column(name, "DOUBLE", d.unit or "its own", f"{d.low:g} to {d.high:g}" + (f" in steps of {d.step:g}" if d.step else ""))
        for name, d in platform.action.dimensions.items()
    ]


def _propensity_unit(platform: Platform) -> str:
    if platform.action.kind == "catalogue":
        return "probability"
    return f"density per {' '.join(d.unit or name for name, d in platform.action.dimensions.items())}"


def _objective_says(platform: Platform, name: str) -> str:
    o = platform.objectives[name]
    bounds = [f"{what} {bound:g}" for what, bound in (("ceiling", o.ceiling), ("floor", o.floor)) if bound is not None]
    said = [f"weight {o.weight:g}", f"discount {o.discount:g} per {format_duration(platform.state.period)}", *bounds]
    return f"immediate value that followed, unweighted, null until it is known ({', '.join(said)})"


# ---- asking ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Answer:
    """A query's rows as an Arrow table; `truncated` if there were more."""

    table: Any
    truncated: bool

    def document(self) -> dict[str, Any]:
        """`columns` (names), `rows` (lists of JSON values) and `truncated`."""
        columns = [[_plain(value) for value in column] for column in self.table.columns]
        rows = [list(row) for row in zip(*columns, strict=True)] if columns else []
        return {"columns": list(self.table.column_names), "rows": rows, "truncated": self.truncated}

    def write(self, path: Path) -> None:
        """The rows as a Parquet file, types kept. Raises `RequestError` for a type that Parquet has not."""
        import pyarrow as pa
        from pyarrow import parquet

        try:
            with replacing(path) as partial:
                parquet.write_table(self.table, partial)
        except pa.ArrowException as error:
            raise RequestError(f"{path}: Parquet has no such type ({_line(error)}); cast that column to VARCHAR") from None
        except OSError as error:
            raise RequestError(f"{path}: cannot be written ({error.strerror or error})") from None


def ask(platform: Platform, sql: str, *, rows: int = MOST_ROWS, seconds: float = MOST_SECONDS, megabytes: int = MOST_MEGABYTES) -> Answer:
    """The answer to one SELECT over the views, in a process of its own.

    Raises `RequestError` with DuckDB's message, or with the limit that was reached; `WorkspaceError` where no logs were accepted yet.
    """
    import pyarrow as pa

    order = {"workspace": str(platform.root), "sql": sql, "rows": rows, "seconds": seconds, "megabytes": megabytes}
    for _ in range(ASKED):
        # -P: a file duckdb.py in the current directory is none of ours
        child = subprocess.run([sys.executable, "-P", "-m", "fastq.queries"], input=json.dumps(order).encode(), capture_output=True, check=False)
        if child.returncode == -signal.SIGALRM:
            raise RequestError(f"the query ran longer than {seconds:g} seconds and was stopped; narrow it by time or player, or count instead of listing")
        if child.returncode < 0:  # where memory is refused, some libraries know no other end
            raise RequestError(_too_much_memory(megabytes))
        if child.returncode:
            raise RuntimeError(f"a query's process ended with {child.returncode}: {child.stderr.decode('utf-8', 'replace')[-4000:]}")
        head, _, body = child.stdout.partition(b"\n")
        said = json.loads(head)
        if said["replaced"]:
            continue
        if kind := said.get("error"):
            raise {"WorkspaceError": WorkspaceError, "BundleError": BundleError}.get(kind, RequestError)(said["says"])
        return Answer(pa.ipc.open_stream(body).read_all(), bool(said["truncated"]))
    raise WorkspaceError(f"{Workspace(platform.root).tables}: a validation replaces the accepted logs just now; ask again in a moment")


def _too_much_memory(megabytes: float) -> str:
    return f"the query needed more than {megabytes:g} MB of memory and was stopped; select fewer columns or rows, or aggregate"


def _main() -> None:
    """The process that `ask` starts: an order on standard input, one JSON line and an Arrow stream on standard output."""
    import pyarrow as pa

    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no part of the answer
    order = json.loads(sys.stdin.buffer.read())
    workspace = Workspace(Path(order["workspace"]))
    put_back(workspace)
    before = written(workspace)

    def say(document: dict[str, Any]) -> None:
        """The head of the answer; where the tables were replaced meanwhile, whoever asked has to ask again, for the answer may be of both."""
        out.write(json.dumps(document | {"replaced": written(workspace) != before}).encode() + b"\n")

    try:
        platform, sql, megabytes = load_platform(order["workspace"]), order["sql"], order["megabytes"]
        connection = _opened(platform, _named(sql), megabytes)
        _only_a_select(connection, sql)
        _limit(order["seconds"], megabytes)
        batches, truncated = _run(connection, sql, order["rows"], megabytes)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        say({"truncated": truncated})
        out.write(sink.getvalue())
    except FastqError as error:
        kind = next((k.__name__ for k in (WorkspaceError, BundleError) if isinstance(error, k)), "RequestError")
        say({"error": kind, "says": str(error)})
    except MemoryError:
        say({"error": "RequestError", "says": _too_much_memory(order["megabytes"])})
    out.flush()
    os._exit(0)  # DuckDB's threads may be in the middle of what nobody waits for


def _limit(seconds: float, megabytes: float) -> None:
    """From now on this process may take so much more memory, and ends by SIGALRM, whatever it does and whether its parent lives or not."""
    import resource

    import psutil

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    most = psutil.Process().memory_info().vms + int(megabytes * 2**20) + OVERHEAD
    with contextlib.suppress(ValueError, OSError):  # where a smaller limit holds already, or the system has none
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _only_a_select(connection: DuckDBPyConnection, sql: str) -> None:
    """Raises unless DuckDB's parser, which no comment or odd spelling deceives, finds exactly one statement, and that a SELECT."""
    row = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchone()
    assert row is not None
    parsed = json.loads(row[0])
    if parsed["error"] and parsed["error_type"] != "not implemented":
        raise RequestError(f"DuckDB: {_line(parsed['error_message'])}")
    found = "another statement" if parsed["error"] else f"{len(parsed['statements'])} statements"
    if parsed["error"] or len(parsed["statements"]) != 1:
        raise RequestError(f"expected one SELECT, got {found}: the views are read-only, and no file, setting or extension is within reach")
    if called := sorted(_called(parsed) & DEEDS):
        raise RequestError(f"expected one SELECT that only reads, got {called[0]}(): no log, profile or checkpoint is within reach, nor SQL inside SQL")


def _called(parsed: Any) -> set[str]:
    """The names of all functions in what DuckDB's parser found."""
    found: set[str] = set()
    left = [parsed]
    while left:
        match left.pop():
            case dict() as node:
                found |= {str(name).lower() for name in [node.get("function_name")] if name}
                left += node.values()
            case list() as nodes:
                left += nodes
    return found


def _run(connection: DuckDBPyConnection, sql: str, rows: int, megabytes: float) -> tuple[list[Any], bool]:
    """At most `rows` rows as record batches (one at least, for the columns), and whether there were more."""
    import duckdb
    import pyarrow as pa

    kept: list[Any] = []
    left, size = rows, 0
    try:
        reader = connection.execute(sql).to_arrow_reader(2_048)
        for batch in reader:
            kept.append(batch.slice(0, left))
            size += kept[-1].nbytes
            if size > MOST_BYTES:
                raise RequestError(f"the answer is larger than {MOST_BYTES // 2**20} MB; select fewer columns or rows, or aggregate")
            if batch.num_rows > left:
                return kept, True
            left -= batch.num_rows
    except (duckdb.OutOfMemoryException, pa.ArrowMemoryError):
        raise RequestError(_too_much_memory(megabytes)) from None
    except (duckdb.Error, pa.ArrowException, UnicodeError) as error:
        if "bad_alloc" in str(error) or "bad allocation" in str(error):
            raise RequestError(_too_much_memory(megabytes)) from None
        # its own guess of what was meant knows hidden tables, and only the views that this query names
        there = f"; there are {', '.join(VIEWS)}" if isinstance(error, duckdb.CatalogException) and "Table with name" in str(error) else ""
        raise RequestError(f"DuckDB: {_line(str(error).split(chr(10))[0] if there else error)}{there}") from None
    return kept or [pa.RecordBatch.from_pylist([], schema=reader.schema)], False


def _line(error: object) -> str:
    return " ".join(str(error).split("\n\nLINE ")[0].split())[:600]  # without DuckDB's picture of where it was


def _plain(scalar: Any) -> Any:
    """An Arrow scalar as a JSON value; a moment that no calendar holds (infinity, beyond the year 9999) is null."""
    try:
        return _json(scalar.as_py())
    except (OverflowError, ValueError):
        return None


def _json(value: Any) -> Any:
    match value:
        case None | bool() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Decimal():
            return _json(int(value)) if value == value.to_integral_value() and value.as_tuple().exponent == 0 else float(value)
        case int():
            return value if -(2**63) <= value < 2**63 else str(value)  # JSON readers take no larger numbers
        case datetime():
            moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
            return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
        case date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case bytes():
            return base64.b64encode(value).decode()
        case dict():
            return {str(key): _json(one) for key, one in value.items()}
        case list():
            return [_json(one) for one in value]
        case (int(months), int(days), int(nanoseconds)) if hasattr(value, "nanoseconds"):  # an interval, as ISO 8601 has it
            return f"P{months}M{days}DT{nanoseconds / 1e9:g}S"
        case tuple():
            return [_json(one) for one in value]
    return str(value)


# ---- the connection ----------------------------------------------------------------------------------------------------
def connect(workspace: str | Path = ".") -> DuckDBPyConnection:
    """A read-only DuckDB connection with all views of a workspace, as they are now, for notebooks: `connect().sql("FROM decisions").pl()`.

    Temporary tables may be made; nothing else can be written, no file or network reached, no setting changed. Memory is DuckDB's own default
    limit. Raises `WorkspaceError` where no logs were accepted yet.
    """
    platform = load_platform(workspace)
    place = Workspace(platform.root)
    for _ in range(ASKED):
        put_back(place)
        before = written(place)
        try:
            connection = _opened(platform, frozenset(VIEWS), None)
        except WorkspaceError:
            if written(place) == before:
                raise
            continue
        if written(place) == before:  # else some views may be of the tables before and some of those after
            return connection
        connection.close()
    raise WorkspaceError(f"{place.tables}: a validation replaces the accepted logs just now; connect again in a moment")


def _named(sql: str) -> frozenset[str]:
    """The views that a query may read, so that one about models alone does not pay for explanations; too many rather than too few."""
    lower = sql.lower()
    return frozenset(VIEWS if any(word in lower for word in WHOLE_CATALOGUE) else (name for name in VIEWS if name in lower))


def _opened(platform: Platform, wanted: frozenset[str], megabytes: float | None) -> DuckDBPyConnection:
    """A connection with the wanted views and its wall shut; with `megabytes` for one SELECT of a stranger's, else for a notebook.

    A path that may be read may be written too, so only a connection whose statements are SELECTs alone scans Parquet by path; it is up to
    three times as fast as Arrow's scan, which the other one has.
    """
    import duckdb

    config: dict[str, str | bool | int | float | list[str]] = {
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        "python_enable_replacements": False,  # else SQL could name variables of the program around it
        "temp_directory": "",  # nothing is spilled: what does not fit is refused
    }
    if megabytes is not None:
        config |= {"memory_limit": f"{megabytes:g}MB", "threads": max(1, min(4, (os.cpu_count() or 2)))}
        connection = duckdb.connect(":memory:", config=config)
    else:
        with tempfile.TemporaryDirectory(prefix="fastq-") as directory:  # only a file can be opened read-only; it is open, so it may go
            path = Path(directory) / "empty.db"
            duckdb.connect(str(path)).close()
            connection = duckdb.connect(str(path), read_only=True, config=config)
    try:
        _lay(_Sources(platform, connection, by_path=megabytes is not None), wanted)
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
    except BaseException:
        connection.close()
        raise
    return connection


class _Sources:
    """Frames and Parquet files that a connection reads under hidden names; files stay open, so a validation meanwhile changes nothing."""

    def __init__(self, platform: Platform, connection: DuckDBPyConnection, *, by_path: bool) -> None:
        self.platform, self.connection, self._by_path = platform, connection, by_path
        self._readable: list[str] = []

    def frame(self, name: str, frame: pl.DataFrame) -> None:
        self.connection.register(name, frame.to_arrow())

    def kept(self, name: str, make: Callable[[], pl.DataFrame]) -> None:
        """What is made of served decisions, and kept in a file until anything changes of which it could be made."""
        found = _kept_frame(self.platform, name.strip("_"), make)
        self.frame(name, found) if isinstance(found, pl.DataFrame) else self.parquet(name, found)

    def parquet(self, name: str, *paths: Path) -> None:
        if self._by_path and not any(glob.has_magic(str(path)) for path in paths):
            these = [_text(str(path.resolve())) for path in paths]
            self._readable += these
            self.connection.execute(f"SET allowed_paths = [{', '.join(self._readable)}]")
            self.connection.execute(f"CREATE TEMP VIEW {_name(name)} AS FROM read_parquet([{', '.join(these)}])")
            return
        import pyarrow as pa
        from pyarrow import dataset

        fragments = [dataset.ParquetFileFormat().make_fragment(pa.OSFile(str(path))) for path in paths]
        self.connection.register(name, dataset.FileSystemDataset(fragments, fragments[0].physical_schema, fragments[0].format))

    def view(self, view: View, select: str) -> None:
        """The view as documented: names, order and types, over a query that has its columns."""
        columns = ", ".join(f"CAST({_name(c.name)} AS {c.type}) AS {_name(c.name)}" for c in view.columns)
        self.connection.execute(f"CREATE TEMP VIEW {_name(view.name)} AS SELECT {columns} FROM ({select})")  # noqa: S608 - names are quoted


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _lay(sources: _Sources, wanted: frozenset[str]) -> None:
    """Create the wanted views."""
    platform, known = sources.platform, views(sources.platform)
    if wanted & {"decisions", "outcomes", "players"}:
        _lay_decisions(sources, known)
    if wanted & {"outcomes"}:
        _lay_outcomes(sources, known["outcomes"])
    if wanted & {"recommendations"}:
        sources.kept("_recommendations", lambda: _recommendations(platform, known["recommendations"]))
        sources.view(known["recommendations"], "FROM _recommendations")
    if wanted & {"explanations"}:
        sources.parquet("_explanations", *_explained(platform))
        sources.view(known["explanations"], "FROM _explanations")
    if wanted & {"attributions"}:
        sources.parquet("_attributions", *_attributed(platform))
        sources.view(known["attributions"], "FROM _attributions")
    if wanted & {"players"}:
        if platform.logs.players is not None:
            sources.parquet("_players", _accepted(platform, "players", known["players"]))
            sources.view(known["players"], "FROM _players")
        else:
            sources.view(known["players"], "SELECT DISTINCT player_id, NULL AS valid_from FROM decisions")
    if wanted & {"activity"}:
        _lay_activity(sources, known["activity"])
    if wanted & {"models", "estimates"}:
        _lay_models(sources, known, wanted)


# ---- decisions and what followed ---------------------------------------------------------------------------------------
def _accepted(platform: Platform, table: str, view: View, ours: Iterable[str] = ()) -> Path:
    """The file of an accepted table. Raises `WorkspaceError` where there is none, or where it has not the columns of the view but `ours`."""
    path = Workspace(platform.root).tables / f"{table}.parquet"
    try:
        found = set(pl.read_parquet_schema(path))
    except FileNotFoundError:
        raise WorkspaceError(f"{path.parent}: no accepted logs here yet; run `fastq retrain`") from None
    except (OSError, pl.exceptions.PolarsError) as error:
        raise WorkspaceError(f"{path}: damaged ({_line(error)}); run `fastq retrain` again") from None
    if missing := [c.name for c in view.columns if c.name not in found and c.name not in ours]:
        raise WorkspaceError(f"{path}: was written for another fastq.yaml, it has no {', '.join(missing)}; run `fastq retrain` again")
    return path


def _lay_decisions(sources: _Sources, known: Mapping[str, View]) -> None:
    """The accepted decisions, and the served ones as they stand now: outcomes may have come since the last validation."""
    platform, view = sources.platform, known["decisions"]
    origin, accepted = (column.name for column in view.columns[-2:])
    path = _accepted(platform, "decisions", view, (origin, accepted))
    sources.parquet("_accepted", path)
    logged = f"SELECT *, 'logs' AS {_name(origin)}, true AS {_name(accepted)}"
    sources.kept("_served", lambda: _served(platform, path, [column.name for column in view.columns]))
    found = sources.connection.execute(f"SELECT count(*), coalesce(bool_or({_name(STRAY)}), false) FROM _served").fetchone()  # noqa: S608 - a constant
    assert found is not None
    others = "_accepted"
    if found[1]:
        others = f"_accepted ANTI JOIN (SELECT decision_id FROM _served WHERE {_name(STRAY)}) USING (decision_id)"  # noqa: S608 - a constant
    served = f" UNION ALL BY NAME SELECT * EXCLUDE ({_name(STRAY)}) FROM _served" if found[0] else ""  # noqa: S608 - a constant
    sources.view(view, f"{logged} FROM {others}{served}")


def _served(platform: Platform, path: Path, columns: list[str]) -> pl.DataFrame:
    """What fastq served as it stands now, in the `columns` of the view, and with `STRAY`: whether it stands among the accepted decisions in `path` too."""
    origin, accepted = columns[-2:]
    served = read_served(platform)
    if served.is_empty():
        return served.with_columns(pl.lit(None, pl.String).alias(origin), pl.lit(None, pl.Boolean).alias(accepted)).select(
            *columns, pl.lit(value=False).alias(STRAY)
        )
    objectives = list(platform.objectives)
    exported = _exported(platform, served)
    strays = _strays(path, served, exported, objectives)
    exported = pl.concat([exported, strays])
    undone = _latest(served_log(platform, "executed"), ["decision_id"]).filter(pl.col("action").is_null())["decision_id"]
    done = ~pl.col("decision_id").is_in(undone.implode())
    merged = served.join(exported, on="decision_id", how="left", suffix=" logged", maintain_order="left").with_columns(
        # as records has it: an export of what was served adds what was not reported, unless it was not carried out
        *(pl.when(done).then(pl.coalesce(o, f"{o} logged")).alias(o) for o in objectives),
        pl.coalesce("assignment", "assignment logged"),
        pl.col("decision_id").is_in(exported["decision_id"].implode()).alias(accepted),
        pl.lit("served").alias(origin),
    )
    return merged.select(*columns, pl.col("decision_id").is_in(strays["decision_id"].implode()).alias(STRAY))


def _exported(platform: Platform, served: pl.DataFrame) -> pl.DataFrame:
    """The accepted rows of decisions that fastq served: `decision_id`, `assignment` and the objectives."""
    columns = ["decision_id", "assignment", *platform.objectives]
    path = Workspace(platform.root).tables / "served.parquet"
    if not path.exists():  # the tables are an earlier version's
        return served.clear().select(columns)
    return _readable(path, columns).join(served.select("decision_id"), on="decision_id", how="semi", maintain_order="left")


def _strays(path: Path, served: pl.DataFrame, exported: pl.DataFrame, objectives: list[str]) -> pl.DataFrame:
    """Rows as `_exported` gives them, of served decisions that the platform exported and the validation did not know as served.

    Where a server's log was away at that time. To look for them among ten million takes longer than most questions, so it is done only for decisions
    that were made in the time that the file reaches over, were not there as served and were not refused: hardly ever any.
    """
    from pyarrow import parquet

    about = parquet.read_metadata(path)
    at = about.schema.to_arrow_schema().get_field_index("decided_at")
    ends = [about.row_group(k).column(at).statistics for k in range(about.num_row_groups)]
    doubtful = served.join(exported, on="decision_id", how="anti")
    if ends and all(end is not None and end.has_min_max for end in ends):
        doubtful = doubtful.filter(pl.col("decided_at").is_between(min(end.min for end in ends), max(end.max for end in ends)))
    if not doubtful.is_empty():
        refused = _readable(path.with_name("quarantine.parquet"), ["table", "decision_id"]).filter(pl.col("table") == "decisions")
        doubtful = doubtful.join(refused, on="decision_id", how="anti")
    if doubtful.is_empty():
        return exported.clear()
    rows = pl.scan_parquet(path, glob=False).join(doubtful.lazy(), on="decision_id", how="semi")
    return rows.select("decision_id", "assignment", *objectives).collect()


def _readable(path: Path, columns: list[str]) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, columns=columns, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise WorkspaceError(f"{path}: damaged ({_line(error)}); run `fastq retrain` again") from None


def _lay_outcomes(sources: _Sources, view: View) -> None:
    def reported() -> pl.DataFrame:
        return _latest(served_log(sources.platform, "outcomes"), ["decision_id", "objective"]).select("decision_id", "objective", _moment("recorded_at"))

    sources.kept("_reported", reported)
    long = " UNION ALL ".join(
        f"SELECT decision_id, {_text(o)} AS objective, {_name(o)} AS value FROM decisions WHERE {_name(o)} IS NOT NULL"  # noqa: S608 - names are quoted
        for o in sources.platform.objectives
    )
    sources.view(view, f"FROM ({long}) LEFT JOIN _reported USING (decision_id, objective)")


def _recommendations(platform: Platform, view: View) -> pl.DataFrame:
    """What was served, by the endpoint, the command line and in batches, as it was answered."""
    value, explore, exploration, degraded, carried_out, source = (column.name for column in view.columns[-6:])
    live = served_log(platform, "decisions", {"detail": pl.String()})

    answered = pl.col("detail").str.json_decode(
        pl.Struct({"value": pl.Float64(), "explore": pl.Boolean(), "exploration": pl.Float64(), "degraded": pl.String()})
    )
    action = _action(platform)
    live = live.with_columns(*action, _moment("decided_at"), answered.alias("detail"), pl.lit("endpoint").alias(source)).drop("action")
    ours = {value: "value", explore: "explore", exploration: "exploration", degraded: "degraded"}
    live = live.with_columns(pl.col("detail").struct.field(name).alias(shown) for shown, name in ours.items()).drop("detail")
    names = ["decision_id", "player_id", "decided_at", "policy", "model_version", *platform.action_columns, "propensity"]
    batches = [
        frame.select(pl.col(name).cast(live.schema[name]) for name in names if name in frame.columns).with_columns(pl.lit("batch").alias(source))
        for frame in _batches(platform)
    ]
    served = pl.concat([live, *batches], how="diagonal").unique("decision_id", keep="first", maintain_order=True)
    done = _latest(served_log(platform, "executed"), ["decision_id"]).with_columns(action)
    done = done.select("decision_id", pl.col("action").is_null().alias("?not"), *(pl.col(a).alias(f"{a} done") for a in platform.action_columns))
    served = served.join(done, on="decision_id", how="left", maintain_order="left")
    same = pl.all_horizontal(pl.col(f"{a} done") == pl.col(a) for a in platform.action_columns)
    verdict = pl.when("?not").then(pl.lit("not at all")).when(same).then(pl.lit("as served")).when(pl.col("?not").is_not_null()).then(pl.lit("otherwise"))
    return served.with_columns(verdict.alias(carried_out)).select(column.name for column in view.columns)


def _batches(platform: Platform) -> Iterator[pl.DataFrame]:
    for path in sorted(Workspace(platform.root).served.glob("[!.]*.parquet")):
        try:
            yield pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise WorkspaceError(f"{path}: a batch of served decisions cannot be read ({_line(error)}); restore it from a backup, or move it away") from None


def _action(platform: Platform) -> list[pl.Expr]:
    kind = pl.Float64() if platform.dimension_names else pl.String()
    return json_fields("action", dict.fromkeys(platform.action_columns, kind))


def _moment(column: str) -> pl.Expr:
    return pl.col(column).cast(TIME)


def _latest(frame: pl.DataFrame, key: list[str]) -> pl.DataFrame:
    """What was recorded last of each, whichever server took it."""
    return frame.sort("recorded_at").unique(key, keep="last", maintain_order=True)


def _lay_activity(sources: _Sources, view: View) -> None:
    """The accepted events, and those that came over HTTP and are not among them; an export of such an event is the same event."""
    platform = sources.platform
    if platform.logs.activity is None:
        sources.view(view, f"SELECT {', '.join(f'NULL AS {_name(c.name)}' for c in view.columns)} WHERE false")
        return
    sources.parquet("_activity", _accepted(platform, "activity", view))

    def heard() -> pl.DataFrame:
        events = served_log(platform, "activity").sort("recorded_at").unique(["player_id", "occurred_at", "body"], keep="first", maintain_order=True)
        values = json_fields("body", dict.fromkeys(platform.state.measures, pl.Float64()))
        events = events.with_columns(_moment("occurred_at"), pl.max_horizontal("recorded_at", "occurred_at").cast(TIME).alias("known_at"), *values)
        return events.select(column.name for column in view.columns)

    sources.kept("_heard", heard)
    # of what is counted a value says nothing; and exports are often float32
    same = " AND ".join(
        f"(h.{_name(n)} IS NULL) = (a.{_name(n)} IS NULL)" if m.aggregate == "count"
        else f"CAST(h.{_name(n)} AS FLOAT) IS NOT DISTINCT FROM CAST(a.{_name(n)} AS FLOAT)"
        for n, m in platform.state.measures.items()
    )  # fmt: skip
    on = "h.player_id = a.player_id AND h.occurred_at = a.occurred_at" + (f" AND {same}" if same else "")
    sources.view(view, f"FROM _activity UNION ALL BY NAME FROM _heard AS h ANTI JOIN _activity AS a ON {on}")


# ---- what is kept of what was served -----------------------------------------------------------------------------------
def _kept_frame(platform: Platform, name: str, make: Callable[[], pl.DataFrame]) -> pl.DataFrame | Path:
    """What `make` makes of the servers' logs, the batches and the accepted tables; the file it is kept in where none of them changed since it was made.

    Whoever forgets a player notes that, then strikes every Parquet file under the lock that is held here from reading to writing, then the logs: nothing is
    kept as long as these still hold somebody forgotten. Nor where the lock is not to be had, where something changes meanwhile, or where there is no room.
    """
    workspace = Workspace(platform.root)
    directory = workspace.state / "queries"
    if (now := _as_it_lies(platform)) is None:
        return make()
    path = directory / f"{name}-{now}.parquet"
    if path.exists():
        return path
    try:
        with workspace.lock("queries"):
            found = make()
            if _as_it_lies(platform) != now or _holds_forgotten(platform):
                return found
            workspace.make(directory)
            with replacing(path) as partial:
                found.write_parquet(partial, compression="lz4")
            for old in directory.glob(f"{name}-*.parquet"):  # a question that is being answered may still read it
                if old != path and clock.time() - old.stat().st_mtime > 2 * MOST_SECONDS:
                    old.unlink(missing_ok=True)
            return path
    except (WorkspaceError, OSError):
        return make()


def _as_it_lies(platform: Platform) -> str | None:
    """A name for the servers' logs, the batches, the accepted tables and the platform file as they are; None where a file changed so lately that its time of
    change may not tell it from what comes next. Every commit writes to a log or to its `-wal`, and no reader does.
    """
    workspace = Workspace(platform.root)
    places = [path for kind in ("db", "db-wal", "parquet") for path in workspace.served.glob(f"[!.]*.{kind}")]
    found = []
    for place in sorted([*places, workspace.tables, *workspace.tables.glob("*.parquet")]):
        try:
            about = place.stat()
        except FileNotFoundError:
            return None
        if about.st_size or place.suffix != ".db-wal":  # an empty one may come from a reader
            found.append((place.name, about.st_ino, about.st_size, about.st_mtime_ns))
    if not settled(max(changed for *_, changed in found)):
        return None
    return hashlib.sha256(json.dumps([FORM, platform.model_dump_json(), found]).encode()).hexdigest()[:20]


def _holds_forgotten(platform: Platform) -> bool:
    workspace = Workspace(platform.root)
    if not (gone := forgotten(workspace)):
        return False
    served = [served_log(platform, table)["player_id"] for table in ("decisions", "activity")] + [batch["player_id"] for batch in _batches(platform)]
    return bool(gone.holds(pl.concat([ids.cast(pl.String) for ids in served])).any())


# ---- models ------------------------------------------------------------------------------------------------------------
def _lay_models(sources: _Sources, known: Mapping[str, View], wanted: frozenset[str]) -> None:
    from fastq import registry

    platform = sources.platform
    versions = registry.models(platform)
    if "models" in wanted:
        schema = {"version": pl.String(), "aliases": pl.List(pl.String()), "created_at": pl.String(), "verdict": pl.String()}
        sources.frame("_models", pl.DataFrame(versions, schema=schema))
        sources.view(known["models"], "FROM _models")
    if "estimates" in wanted:
        numbers = {"value", "low", "high", "ess"}
        schema = {c.name: pl.Float64() if c.name in numbers else pl.String() for c in known["estimates"].columns}
        rows = []
        for model in versions:
            report = _bundle(platform, str(model["version"]))[1].get("details", {}).get("evaluation") or {}
            rows += [{**{name: row.get(name) for name in schema}, "model_version": str(model["version"])} for row in report.get("estimates", [])]
        sources.frame("_estimates", pl.DataFrame(rows, schema=schema))
        sources.view(known["estimates"], "FROM _estimates")


def _bundle(platform: Platform, version: str) -> tuple[Path, dict[str, Any]]:
    """A version's bundle and its description; the verified copy that is here, else fetched. Raises `BundleError`."""
    from fastq import registry

    directory = Workspace(platform.root).models / version
    directory = directory if directory.exists() else registry.fetch(platform, version)
    return directory, registry.verify(directory)


# ---- explanations ------------------------------------------------------------------------------------------------------
def _explained(platform: Platform) -> list[Path]:
    """The files of served decisions' parts."""
    return _kept(platform, "explanations", _EXPLAINED, _parts, most=EXPLAINED)


def _attributed(platform: Platform) -> list[Path]:
    """The files of what moved the values of served decisions."""
    return _kept(platform, "attributions", _ATTRIBUTED, _moved, most=ATTRIBUTED)


def _kept(platform: Platform, name: str, schema: Mapping[str, pl.DataType], made: Callable[[Platform, list[Any]], pl.DataFrame], most: int) -> list[Path]:
    """The files of what is `made` of served decisions, `CHUNK` decisions in each but the last one to be written, so that memory has a bound.

    What was decided never changes, so each is computed once and kept; at most `most` in one go, the newest.
    """
    workspace = Workspace(platform.root)
    directory = workspace.state / "queries" / name
    workspace.make(directory)
    with workspace.lock("queries", wait_seconds=600):
        directory.with_suffix(".parquet").unlink(missing_ok=True)  # all of it in one file, as earlier versions had it
        served: dict[str, tuple[int, Path]] = {}  # when, and in which log
        for log in decision_logs(platform):
            with reading_log(log) as database:
                query = "SELECT decision_id, decided_at FROM decisions WHERE state IS NOT NULL AND model_version IS NOT NULL"
                for decision_id, at in database.execute(query):
                    served.setdefault(decision_id, (at, log))
        files = {path: ids for path in sorted(directory.glob("*.parquet")) if len(ids := _still(path, schema, served))}
        done = set[str]().union(*files.values())
        missing = sorted((i for i in served if i not in done), key=lambda i: -served[i][0])[:most]
        query = "SELECT decision_id, model_version, action, state FROM decisions WHERE decision_id IN (SELECT value FROM json_each(?))"
        for start in range(0, len(missing), CHUNK):
            chunk, rows = missing[start : start + CHUNK], []
            for log in {served[i][1] for i in chunk}:
                with reading_log(log) as database:
                    rows += database.execute(query, (json.dumps([i for i in chunk if served[i][1] == log]),)).fetchall()
            found = made(platform, rows)
            into = next((path for path, there in files.items() if len(there) + len(chunk) <= CHUNK), directory / f"{uuid.uuid4().hex}.parquet")
            with replacing(into) as partial:
                pl.concat([*([pl.read_parquet(into)] if into in files else []), found]).write_parquet(partial)
            files[into] = files.get(into, set()) | set(found["decision_id"].unique())
        if not files:
            empty = directory / "none.parquet"
            with replacing(empty) as partial:
                pl.DataFrame(schema=schema).write_parquet(partial)
            files[empty] = set()
    return list(files)


def _still(path: Path, schema: Mapping[str, pl.DataType], served: Mapping[str, Any]) -> set[str]:
    """The decisions in a file of `_kept`, rid of those that are gone; none, and no file, where it is damaged or an earlier version's: it is only a copy."""
    with contextlib.suppress(OSError, pl.exceptions.PolarsError):
        if pl.read_parquet_schema(path) == pl.Schema(schema):
            ids = set(pl.read_parquet(path, columns=["decision_id"])["decision_id"].unique())
            if gone := ids - served.keys():
                with replacing(path) as partial:
                    pl.scan_parquet(path).filter(~pl.col("decision_id").is_in(pl.Series(sorted(gone)).implode())).sink_parquet(partial)
            if ids - gone:
                return ids - gone
    path.unlink(missing_ok=True)
    return set()


def _by_policy(platform: Platform, decisions: list[Any]) -> Iterator[tuple[str, Policy, list[str], PlayerStates, np.ndarray]]:
    """Decisions (id, version, action, state), one model at a time: version, policy, ids, states, actions [B, D]. Unreadable models are left out."""
    from fastq import features

    for version in dict.fromkeys(row[1] for row in decisions):
        try:
            policy = _policy(platform, version)
        except FastqError as error:
            logger.warning("decisions of model version %s are not explained: %s", version, error)
            continue
        rows = [(i, json.loads(action), state) for i, v, action, state in decisions if v == version]
        rows = [row for row in rows if None not in row[1].values()]  # a catalogue's default may be no item
        if not rows:
            continue
        columns = policy.platform.action_columns
        given = np.array([r[1]["item_id"] for r in rows], object) if policy.catalogue is not None else np.array([[r[1][c] for c in columns] for r in rows])
        vectors = policy.as_actions(given) if policy.catalogue is not None else given.astype(float)
        yield version, policy, [r[0] for r in rows], features.unpack_states(policy.platform, [r[2] for r in rows]), vectors


def _parts(platform: Platform, decisions: list[Any]) -> pl.DataFrame:
    """The weighted parts of decisions and what they have over each behaviour policy's, with what is said of them together; as `fastq.explanation` has it."""
    from fastq.explanation import HORIZONS, explain

    found = [pl.DataFrame(schema=_EXPLAINED)]
    for version, policy, ids, states, vectors in _by_policy(platform, decisions):
        names = [(objective, horizon) for objective in policy.platform.objectives for horizon in HORIZONS]
        why = None
        for against in (None, *policy.policies):
            why = explain(policy, states, actions=vectors, against=against, attributions=False, beside=why)
            parts, low, high, decisive = (why.parts, why.low, why.high, None) if (c := why.contrast) is None else (c.parts, c.low, c.high, c.decisive)
            together = pl.DataFrame(
                {
                    "decision_id": ids, "model_version": version, "against": against, "low": low, "high": high, "width": why.evidence.width,
                    "caution": why.score["caution"], "guardrail": why.score["guardrail"], "disagreement": why.evidence.disagreement,
                    "distance": why.evidence.distance.mean(1) if why.evidence.distance.shape[1] else None,
                    "policies": why.evidence.policies, "grade": why.evidence.grade, "verdict": why.evidence.verdict,
                },
                schema_overrides={name: kind for name, kind in _EXPLAINED.items() if name not in ("objective", "horizon", "value", "decisive")},
            )  # fmt: skip
            row, part = np.indices((len(ids), len(names))).reshape(2, -1)
            each = {
                "objective": _named_by([objective for objective, _ in names], part),
                "horizon": _named_by([horizon for _, horizon in names], part),
                "value": pl.Series(parts.ravel()),
                "decisive": pl.lit(None) if decisive is None else pl.Series([name in reasons for reasons in decisive for name in names], dtype=pl.Boolean),
            }
            found.append(together[row].with_columns(pl.col("width", "distance").fill_nan(None), **each).select(list(_EXPLAINED)).cast(pl.Schema(_EXPLAINED)))
    return pl.concat(found)


def _moved(platform: Platform, decisions: list[Any]) -> pl.DataFrame:
    """What each measure, and each period, moved the values of decisions; as `fastq.explanation` has it."""
    from fastq.explanation import attribute

    found = [pl.DataFrame(schema=_ATTRIBUTED)]
    for version, policy, ids, states, vectors in _by_policy(platform, decisions):
        moved = attribute(policy, policy.encode(states), vectors)
        window = moved.periods.shape[1]
        for name, values in [*moved.measures.items(), *((i, moved.periods[:, i]) for i in range(window))]:
            about = {
                "measure": pl.lit(name if isinstance(name, str) else None, pl.String()),
                "periods_before": pl.lit(None if isinstance(name, str) else window - name, pl.Int64()),
            }
            columns = {"decision_id": pl.Series(ids, dtype=pl.String), "value": pl.Series(values, dtype=pl.Float64)}
            frame = pl.DataFrame(columns | {"completeness_gap": pl.Series(moved.completeness_gap, dtype=pl.Float64)})
            found.append(frame.with_columns(model_version=pl.lit(version), **about).select(list(_ATTRIBUTED)))
    return pl.concat(found)


def _named_by(names: list[Any], at: Any) -> pl.Series:
    return pl.Series(names, dtype=pl.String).gather(at)


def _policy(platform: Platform, version: str) -> Policy:
    from fastq.policy import Policy

    try:
        return Policy.load(_bundle(platform, version)[0], version=version)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{platform.platform} version {version}: cannot be read by this release ({_line(error)})") from None


if __name__ == "__main__":
    _main()
