"""Where a log lies and what its columns are: files, globs, URLs and database queries, lazily, as expressions of canonical types.

Nothing here knows what a decision is. A value that cannot be its column's type becomes null and keeps its text beside it, so
that one bad field is one bad row; and so is a line of text that is no row at all (`by_line`).
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import glob
import io
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import polars as pl
import polars.selectors as cs
import pyarrow as pa
import pyarrow.parquet as pq
from polars.io.plugins import register_io_source

from fastq.errors import LogsError
from fastq.platform import Logs

Kind = Literal["id", "name", "number", "time"]

TIME = pl.Datetime("us", "UTC")
DTYPES: dict[Kind, pl.DataType] = {"id": pl.String(), "name": pl.String(), "number": pl.Float64(), "time": TIME}
EXPECTED: dict[Kind, tuple[str, str]] = {  # what a column should hold, and the mend
    "id": ("an id: text or whole numbers", "write ids as text or whole numbers"),
    "name": ("text", "write it as text"),
    "number": ("a number", "write it as a number, empty where it is not known"),
    "time": ("a timestamp", "write times in UTC as 2026-03-01T06:00:00Z, as a timestamp type or as seconds since 1970"),
}
SUFFIXES = {".parquet": "Parquet", ".pq": "Parquet", ".csv": "CSV", ".ndjson": "NDJSON", ".jsonl": "NDJSON"}
# what is written for others, by the same endings
SINKS: dict[str, Callable[[pl.LazyFrame, Path], object]] = {
    ".parquet": pl.LazyFrame.sink_parquet,
    ".csv": pl.LazyFrame.sink_csv,
    ".ndjson": pl.LazyFrame.sink_ndjson,
}
# Columns that reading adds; `unread("goal")` holds the text of a goal that is no number.
FILE, ROW, OTHERS = "?file", "?row", "?others"
BROKEN = "?broken"  # why a line is no row, beside nulls; of a broken line nothing else is kept, for nobody knows of whom it tells
LINES = 50_000  # of a text log that are held at once where it is read by line
_WHOLE_FLOAT = r"^-?\d+\.0$"


class UnreadableError(LogsError):
    """A file that holds what cannot be read as what its name says."""


def unread(column: str) -> str:
    """Name of the column that holds the text of values that could not be read as `column`'s type."""
    return f"{column}?"


@dataclass(frozen=True)
class Column:
    """A column that a table has: its kind, whether a file may lack it, whether a row may, and the key of `fastq.yaml` that names it."""

    kind: Kind
    optional: bool = False
    nullable: bool = True
    key: str | None = None


@dataclass(frozen=True)
class Source:
    """One file, URL or query of a log. `stamp` (size, time of change, inode) tells whether it is still what it was; None where nothing does."""

    name: str  # for the error texts: relative to the workspace, without user, password and signature
    key: str  # the setting that it comes from
    at: Path | str | Logs.Query
    stamp: list[int] | None

    @property
    def has_lines(self) -> bool:
        """Whether it is a file of text that `by_line` reads."""
        return isinstance(self.at, Path) and format_of(self.name) in ("CSV", "NDJSON")

    def scan(self, root: Path) -> pl.LazyFrame:
        return _query(root, self.key, self.at) if isinstance(self.at, Logs.Query) else _scan(self.name, self.at)


def wholly_before(source: Source, column: str, moment: datetime) -> bool:
    """Whether a Parquet file says, without being read, that every row has a time in `column`, and that all of these are before `moment`."""
    if not isinstance(source.at, Path) or format_of(source.name) != "Parquet":
        return False
    try:
        found = pq.read_metadata(source.at)
        place = found.schema.names.index(column)
        groups = [found.row_group(i).column(place).statistics for i in range(found.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError):
        return False  # whatever is wrong with it, reading says so
    told = [s.max if s is not None and s.has_min_max and s.has_null_count and s.null_count == 0 else None for s in groups]
    return bool(told) and all(isinstance(t, datetime) and (t if t.tzinfo else t.replace(tzinfo=UTC)) < moment for t in told)


def sources_of(root: Path, key: str, source: str | Logs.Query) -> list[Source]:
    """The files of a log, in the order of their names. Raises `LogsError` if there are none."""
    if isinstance(source, Logs.Query):
        return [Source(f"{key} (query)", key, source, None)]
    if "://" in source:
        address = urlsplit(source)
        return [Source(f"{address.scheme}://{address.hostname or ''}{address.path}", key, source, None)]
    path = root / Path(source).expanduser()
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if format_of(p.name) and not p.name.startswith("."))
    elif path.exists():
        paths = [path]
    else:
        paths = sorted(root / name for name in glob.glob(str(Path(source).expanduser()), root_dir=root, recursive=True))  # noqa: PTH207 - absolute patterns too
    if not paths:
        what = "no file matches" if glob.has_magic(source) else "no log files in" if path.is_dir() else "no such file:"
        raise LogsError(f"{key}: {what} {source} (looked in {root}); correct the path, or put the log there")
    found = []
    for path in paths:
        name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
        with naming(name):
            status = path.stat()
        found.append(Source(name, key, path, [status.st_size, status.st_mtime_ns, status.st_ino]))
    return found


def scans(root: Path, key: str, source: str | Logs.Query) -> Iterator[tuple[str, pl.LazyFrame]]:
    """A name for the error texts and a lazy frame, for each file of a log, in the order of their names."""
    for one in sources_of(root, key, source):
        yield one.name, one.scan(root)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn what Polars says of a file into a sentence that names the file: an `UnreadableError`, unless it is empty."""
    try:
        yield
    except pl.exceptions.NoDataError:
        raise LogsError(f"{name}: is empty; export it again") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UnreadableError(f"{name}: cannot be read as {format_of(name) or 'a log'} ({said}); export it again") from None


def format_of(name: str) -> str | None:
    """`Parquet`, `CSV` or `NDJSON`, by a file's name; None for anything else."""
    suffixes = [s.lower() for s in Path(name).suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def _scan(name: str, path: str | Path) -> pl.LazyFrame:
    remote = isinstance(path, str)  # a URL may hold a pattern; a local one is resolved already
    match format_of(name):
        case "Parquet":
            with naming(name):
                return pl.scan_parquet(path, glob=remote)
        case "CSV":
            # every field as text, so that one bad field is one bad row and not a column of another type; a blank line is no row
            with naming(name):
                return pl.scan_csv(path, infer_schema=False, glob=remote).filter(~pl.all_horizontal(cs.all().is_null()))
        case "NDJSON":
            with naming(name):
                rows = pl.scan_ndjson(path, infer_schema_length=None)
                # half of a character is read as a zero, and would be part of another id
                half = pl.any_horizontal(pl.lit(value=False), cs.string().str.contains("\0", literal=True)).fill_null(value=False)
                return rows.with_columns(pl.when(~half).then(pl.all()), pl.when(half).then(pl.lit("holds half of a character, or a zero")).alias(BROKEN))
        case _:
            raise LogsError(f"{name}: expected a name that ends in {', '.join(SUFFIXES)}; convert or rename the log")


def by_line(source: Source, columns: Collection[str]) -> pl.LazyFrame:
    """A source that `has_lines`, line by line, every field as text: slow, for files that hold lines which Polars cannot read.

    Each of these is a row that says why in `BROKEN`: a line of more fields than the header has, one that is no JSON object, one that has a list
    or an object for one of `columns`, one that is not UTF-8. Raises `LogsError` where most lines are such.
    """
    path = source.at
    assert isinstance(path, Path)
    lines: Callable[[], Iterator[tuple[dict[str, str | None], str | None]]]
    lines = {"CSV": lambda: _csv_rows(path), "NDJSON": lambda: _json_rows(path, columns)}[format_of(source.name) or ""]
    with naming(source.name):
        names, good, broken, first = dict[str, None](), 0, 0, ""
        for row, why in lines():
            names.update(dict.fromkeys(row))
            good, broken, first = good + (why is None), broken + (why is not None), first or why or ""
        if broken > good:
            raise ValueError(f"most lines cannot be read; the first such {first}")
    schema = pl.Schema({**dict.fromkeys(names, pl.String()), BROKEN: pl.String()})

    def read(with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, _batch: int | None) -> Iterator[pl.DataFrame]:
        rest = itertools.islice(lines(), n_rows)
        while some := list(itertools.islice(rest, LINES)):
            frame = pl.DataFrame([{**row, BROKEN: why} for row, why in some], schema)
            frame = frame if with_columns is None else frame.select(with_columns)
            yield frame if predicate is None else frame.filter(predicate)

    return register_io_source(read, schema=schema)


def _text(path: Path, **how: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedReader(pa.input_stream(path)), encoding="utf-8-sig", errors="surrogateescape", **how)


def _is_text(said: str) -> bool:
    """False where bytes were no UTF-8, or half of a character stands in the text: neither can be written."""
    try:
        said.encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(path: Path) -> Iterator[tuple[dict[str, str | None], str | None]]:
    with _text(path, newline="") as file:
        rows = csv.reader(file, strict=True)  # a quote that is never closed would hide all rows behind it
        try:
            header = next(filter(None, rows), [])
            for row in rows:
                if not any(row):
                    continue
                if any(row[len(header) :]):
                    yield {}, f"has {len(row)} fields where the header has {len(header)}"
                elif not _is_text("".join(row)):
                    yield {}, "is not UTF-8 text"
                else:  # of two columns of one name the first stands
                    fields = [*row, *[""] * len(header)][: len(header)]
                    yield {c: value or None for c, value in zip(header[::-1], fields[::-1], strict=True)}, None
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num}: {error}") from None


def _json_rows(path: Path, columns: Collection[str]) -> Iterator[tuple[dict[str, str | None], str | None]]:
    with _text(path) as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line.strip(), parse_float=str, parse_int=str, parse_constant=str)  # numbers as they are written
            except (ValueError, RecursionError) as error:
                where = f" ({error.msg.removesuffix(' at')} at character {error.pos})" if isinstance(error, json.JSONDecodeError) else ""
                yield {}, f"is no JSON{where}"
                continue
            if not isinstance(row, dict):
                yield {}, "is no JSON object"
            elif nested := [c for c in columns if isinstance(row.get(c), list | dict)]:
                yield {}, f"holds a list or an object as {nested[0]}"
            else:
                texts = {c: v if v is None or isinstance(v, str) else json.dumps(v) for c, v in row.items()}
                fit = all(_is_text(v) for v in (*texts, *texts.values()) if v is not None)
                yield (texts, None) if fit else ({}, "is not UTF-8 text")


def _query(root: Path, key: str, source: Logs.Query) -> pl.LazyFrame:
    uri = source.uri
    if uri.startswith("sqlite://"):
        path = root / uri.removeprefix("sqlite://")
        if not path.is_file():  # the driver would make an empty database there
            raise LogsError(f"{key}.uri: no such file: {path}; correct the path")
        uri = f"sqlite://{path}"
    try:
        return pl.read_database_uri(source.query, uri).lazy()
    except Exception as error:  # noqa: BLE001 - each driver raises its own
        said = " ".join(str(error).replace(uri, "the database").split())[:200]
        raise LogsError(f"{key}: the query cannot be run ({said}); correct its uri or query") from None


def selection(name: str, columns: Mapping[str, Column], scan: pl.LazyFrame) -> list[pl.Expr]:
    """Each column parsed into its canonical type and, where that can fail, beside it the text of what could not be. Raises `LogsError`."""
    schema = scan.collect_schema()
    selected = []
    for column, what in columns.items():
        if column not in schema:
            if what.optional:
                continue
            near = difflib.get_close_matches(column, schema.names(), n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"the file has {', '.join(schema.names()[:12]) or 'no columns'}"
            named = f", which {what.key} in fastq.yaml names" if what.key else ""
            raise LogsError(f"{name}: column {column!r} is missing{named}; add or rename it: {hint}")
        raw, dtype = pl.col(column), schema[column]
        if isinstance(dtype, pl.Categorical | pl.Enum):
            raw, dtype = raw.cast(pl.String), pl.String()
        floats = _whole_floats(scan, column) if what.kind == "id" and isinstance(dtype, pl.String) else None
        value = parsed(raw, what.kind, dtype, floats)
        if value is None:
            expected, mend = EXPECTED[what.kind]
            raise LogsError(f"{name}: column {column!r} is of type {dtype}, expected {expected}; {mend}")
        selected.append(value.alias(column))
        given = raw.str.contains(r"\S") if isinstance(dtype, pl.String) else raw.is_not_nan() if dtype.is_float() else raw.is_not_null()
        if _can_fail(what.kind, dtype):
            selected.append(pl.when(given & value.is_null()).then(raw.cast(pl.String)).alias(unread(column)))
    return selected


def _can_fail(kind: Kind, dtype: pl.DataType) -> bool:
    """Whether a value of type `dtype` may not be one of this kind."""
    match kind:
        case "number":
            return isinstance(dtype, pl.String)
        case "time":
            return not dtype.is_temporal()
        case "id" | "name":
            return dtype.is_float()


def _whole_floats(scan: pl.LazyFrame, column: str) -> bool:
    """Whether every id that is there ends in `.0`; all are only looked at if the first ones do."""
    ends = pl.col(column).cast(pl.String).str.contains(_WHOLE_FLOAT) | ~pl.col(column).cast(pl.String).str.contains(r"\S")
    return all(rows.select(ends.all().alias("all")).collect(engine="streaming").item() for rows in (scan.head(1_000), scan))


def parsed(raw: pl.Expr, kind: Kind, dtype: pl.DataType, floats: bool | None = None) -> pl.Expr | None:
    """`raw`, of type `dtype`, as its canonical type, null where a value cannot be that; None if no value of that type can.

    `floats`: whether ids of text all end in `.0`; where it is not known, the expression looks at the whole column.
    """
    if isinstance(dtype, pl.Null):
        return raw.cast(DTYPES[kind])
    match kind:
        case "id" | "name":
            return _as_text(raw, kind, dtype, floats)
        case "number":
            if isinstance(dtype, pl.String):
                return raw.str.strip_chars().cast(pl.Float64, strict=False)
            return raw.cast(pl.Float64) if dtype.is_numeric() or isinstance(dtype, pl.Boolean) else None
        case "time":
            return _as_time(raw, dtype)


def _as_text(raw: pl.Expr, kind: Kind, dtype: pl.DataType, floats: bool | None) -> pl.Expr | None:
    if isinstance(dtype, pl.String):
        given = pl.when(raw.str.contains(r"\S")).then(raw)
        if kind == "name":
            return given
        # a table that passed through a program without integers with gaps has 17.0 for 17, in every row
        whole = given.str.contains(_WHOLE_FLOAT).all() if floats is None else pl.lit(value=floats)  # nulls do not count
        return given if floats is False else pl.when(whole).then(given.str.strip_suffix(".0")).otherwise(given)
    if dtype.is_integer() or (isinstance(dtype, pl.Boolean) and kind == "name"):
        return raw.cast(pl.String)
    if dtype.is_float():
        number = pl.when(raw.is_finite() & (raw == raw.round())).then(raw.cast(pl.Int64, strict=False).cast(pl.String))
        return number if kind == "id" else pl.coalesce(number, raw.fill_nan(None).cast(pl.String))
    return None


def _as_time(raw: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    if isinstance(dtype, pl.Datetime):
        return (raw.dt.convert_time_zone("UTC") if dtype.time_zone else raw.dt.replace_time_zone("UTC")).cast(TIME)
    if isinstance(dtype, pl.Date):
        return raw.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    if dtype.is_numeric():
        return _since_1970(raw.cast(pl.Float64))
    if not isinstance(dtype, pl.String):
        return None
    text = raw.str.strip_chars()
    iso = text.str.replace(r"^(\d{4}-\d{2}-\d{2})[ t]", "${1}T").str.replace(r"\s*([zZ]|UTC|GMT)$", "+00:00")
    zoned = iso.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%#z", time_unit="us", strict=False)
    naive = [iso.str.to_datetime(layout, time_unit="us", strict=False) for layout in ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M")]
    day = iso.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us"))
    return pl.coalesce(zoned, pl.coalesce(*naive, day).dt.replace_time_zone("UTC"), _since_1970(text.cast(pl.Float64, strict=False)))


def _since_1970(number: pl.Expr) -> pl.Expr:
    """Seconds, milli-, micro- or nanoseconds since 1970, told apart by their size: from 1973 to 5138 the four do not overlap."""
    size = number.abs()
    scale = pl.when(size < 1e8).then(None).when(size < 1e11).then(1e6).when(size < 1e14).then(1e3).when(size < 1e17).then(1.0).when(size < 1e20).then(1e-3)
    return (number * scale).round().cast(pl.Int64, strict=False).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
