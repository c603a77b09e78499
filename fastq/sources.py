"""Where a log lies and what its columns are: files, globs, URLs and database queries as frames in canonical types.

Nothing here knows what a decision is. A value that cannot be its column's type becomes null and keeps its text beside it, so
that one bad field is one bad row; a column that is of another type altogether raises `LogsError`.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import polars as pl
import polars.selectors as cs

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
# Columns that reading adds; `unread("goal")` holds the text of a goal that is no number.
FILE, ROW, OTHERS = "?file", "?row", "?others"


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
class Rows:
    """All rows of a table in canonical types, in the order of their files' names.

    Beside the table's columns stand `?file` (index into `files`), `?row` (from 1, blank lines left out), `?others` (a hash of
    the ignored columns) and, where a value had the wrong type, its text in `unread(column)`.
    """

    frame: pl.DataFrame
    files: list[str]
    found: set[str]  # columns that at least one file has
    ignored: list[str]  # columns that no key asks for


def read_rows(root: Path, key: str, source: str | Logs.Query, columns: Mapping[str, Column]) -> Rows:
    """Read `columns` from a log; `key` names the setting it comes from. Raises `LogsError` that names file and column."""
    frames: list[pl.DataFrame] = []
    files: list[str] = []
    ignored: dict[str, None] = {}
    for name, scan in scans(root, key, source):
        with naming(name):
            schema = scan.collect_schema()
        others = [c for c in schema.names() if c not in columns]
        # two events may differ only in a column that is of no other use, such as an event's own id
        other = [pl.struct(others).hash().alias(OTHERS)] if others else []
        selection = [*_selection(name, columns, schema), *other, pl.lit(len(files), pl.UInt32).alias(FILE), pl.col(ROW)]
        with naming(name):
            frame = scan.with_row_index(ROW, 1).select(selection).collect(engine="streaming")
        frames.append(_checked(name, columns, frame))
        files.append(name)
        ignored |= dict.fromkeys(others)
    frame = pl.concat(frames, how="diagonal")
    found = set(columns).intersection(frame.columns)
    absent = [pl.lit(None, DTYPES[column.kind]).alias(c) for c, column in columns.items() if c not in found]
    return Rows(frame.with_columns(absent), files, found, list(ignored))


def scans(root: Path, key: str, source: str | Logs.Query) -> Iterator[tuple[str, pl.LazyFrame]]:
    """A name for the error texts and a lazy frame, for each file of a log, in the order of their names."""
    if isinstance(source, Logs.Query):
        yield _query(root, key, source)
        return
    if "://" in source:
        address = urlsplit(source)
        name = f"{address.scheme}://{address.hostname or ''}{address.path}"  # without user, password and signature
        yield name, _scan(name, source)
        return
    path = root / Path(source).expanduser()
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if _format(p.name) and not p.name.startswith("."))
    elif path.exists():
        paths = [path]
    else:
        paths = sorted(root / name for name in glob.glob(str(Path(source).expanduser()), root_dir=root, recursive=True))  # noqa: PTH207 - absolute patterns too
    if not paths:
        what = "no file matches" if glob.has_magic(source) else "no log files in" if path.is_dir() else "no such file:"
        raise LogsError(f"{key}: {what} {source} (looked in {root}); correct the path, or put the log there")
    for path in paths:
        name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
        yield name, _scan(name, path)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn what Polars says of a file into a sentence that names the file."""
    try:
        yield
    except pl.exceptions.NoDataError:
        raise LogsError(f"{name}: is empty; export it again") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise LogsError(f"{name}: cannot be read as {_format(name) or 'a log'} ({said}); export it again") from None


def _format(name: str) -> str | None:
    suffixes = [s.lower() for s in Path(name).suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def _scan(name: str, path: str | Path) -> pl.LazyFrame:
    remote = isinstance(path, str)  # a URL may hold a pattern; a local one is resolved already
    match _format(name):
        case "Parquet":
            with naming(name):
                return pl.scan_parquet(path, glob=remote)
        case "CSV":
            # every field as text, so that one bad field is one bad row and not a column of another type; a blank line is no row
            with naming(name):
                return pl.scan_csv(path, infer_schema=False, glob=remote).filter(~pl.all_horizontal(cs.all().is_null()))
        case "NDJSON":
            with naming(name):
                return pl.scan_ndjson(path, infer_schema_length=None)
        case _:
            raise LogsError(f"{name}: expected a name that ends in {', '.join(SUFFIXES)}; convert or rename the log")


def _query(root: Path, key: str, source: Logs.Query) -> tuple[str, pl.LazyFrame]:
    uri = source.uri
    if uri.startswith("sqlite://"):
        path = root / uri.removeprefix("sqlite://")
        if not path.is_file():  # the driver would make an empty database there
            raise LogsError(f"{key}.uri: no such file: {path}; correct the path")
        uri = f"sqlite://{path}"
    try:
        return f"{key} (query)", pl.read_database_uri(source.query, uri).lazy()
    except Exception as error:  # noqa: BLE001 - each driver raises its own
        said = " ".join(str(error).replace(uri, "the database").split())[:200]
        raise LogsError(f"{key}: the query cannot be run ({said}); correct its uri or query") from None


def _selection(name: str, columns: Mapping[str, Column], schema: pl.Schema) -> list[pl.Expr]:
    """Each column parsed into its canonical type, and beside it the text that could not be."""
    selection = []
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
        value = parsed(raw, what.kind, dtype)
        if value is None:
            expected, mend = EXPECTED[what.kind]
            raise LogsError(f"{name}: column {column!r} is of type {dtype}, expected {expected}; {mend}")
        given = raw.str.contains(r"\S") if isinstance(dtype, pl.String) else raw.is_not_nan() if dtype.is_float() else raw.is_not_null()
        selection.append(value.alias(column))
        if not dtype.is_temporal():
            selection.append(pl.when(given & value.is_null()).then(raw.cast(pl.String)).alias(unread(column)))
    return selection


def parsed(raw: pl.Expr, kind: Kind, dtype: pl.DataType) -> pl.Expr | None:
    """`raw`, of type `dtype`, as its canonical type, null where a value cannot be that; None if no value of that type can."""
    if isinstance(dtype, pl.Null):
        return raw.cast(DTYPES[kind])
    match kind:
        case "id" | "name":
            return _as_text(raw, kind, dtype)
        case "number":
            if isinstance(dtype, pl.String):
                return raw.str.strip_chars().cast(pl.Float64, strict=False)
            return raw.cast(pl.Float64) if dtype.is_numeric() or isinstance(dtype, pl.Boolean) else None
        case "time":
            return _as_time(raw, dtype)


def _as_text(raw: pl.Expr, kind: Kind, dtype: pl.DataType) -> pl.Expr | None:
    if isinstance(dtype, pl.String):
        given = pl.when(raw.str.contains(r"\S")).then(raw)
        if kind == "name":
            return given
        # a table that passed through a program without integers with gaps has 17.0 for 17, in every row
        floats = given.str.contains(r"^-?\d+\.0$").all()  # nulls do not count
        return pl.when(floats).then(given.str.strip_suffix(".0")).otherwise(given)
    if dtype.is_integer() or (isinstance(dtype, pl.Boolean) and kind == "name"):
        return raw.cast(pl.String)
    if dtype.is_float():
        whole = pl.when(raw.is_finite() & (raw == raw.round())).then(raw.cast(pl.Int64, strict=False).cast(pl.String))
        return whole if kind == "id" else pl.coalesce(whole, raw.fill_nan(None).cast(pl.String))
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


def _checked(name: str, columns: Mapping[str, Column], frame: pl.DataFrame) -> pl.DataFrame:
    """Drop the text columns that hold nothing; a column most of whose values could not be read is of the wrong type."""
    texts = {unread(c): c for c in columns if unread(c) in frame.columns}
    lost = frame.select(pl.col(list(texts)).count()).row(0, named=True) if texts else {}
    for text, number in lost.items():
        column = texts[text]
        if number > frame[column].count():
            expected, mend = EXPECTED[columns[column].kind]
            raise LogsError(f"{name}: column {column!r} holds values such as {frame[text].drop_nulls()[0][:60]!r}, expected {expected}; {mend}")
    return frame.drop(text for text, number in lost.items() if not number)
