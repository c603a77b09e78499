"""The workspace's own copy of the logs, in canonical types and in parts that fit into memory; of the logs only what is new or has changed is read.

A file that was read once is not read again while its stamp stays the same: its rows come from the copy, in which rows of one key stand in
one part. So whatever looks at rows of one key (repeats, a player's periods) goes part by part and never holds a whole log. The copy holds rows
as they stood, not yet judged; to delete it costs time and nothing else. Rows of players who were forgotten never get into it: they are counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import uuid
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

import polars as pl
import pyarrow as pa

from fastq.errors import LogsError, WorkspaceError
from fastq.forgetting import Forgotten, forgotten, strike_arrays
from fastq.platform import Logs
from fastq.sources import (
    BROKEN,
    DTYPES,
    EXPECTED,
    FILE,
    OTHERS,
    ROW,
    Column,
    Source,
    UnreadableError,
    by_line,
    format_of,
    naming,
    selection,
    sources_of,
    unread,
    wholly_before,
)
from fastq.workspace import Workspace, is_full, replacing, room

PART_BYTES = 64 << 20  # of a log's files for each part: small ones are grouped within the processor's cache
BATCH_ROWS = 1 << 15
MOST_PARTS = 256  # each is an open file while a log is staged
MOST_SEGMENTS = 16  # beyond them all is staged anew
_STATE, _MARK = "state.json", "reading"


@dataclass(frozen=True)
class Partition:
    """One file of a log (or a query's answer) as it was staged."""

    name: str  # empty once it counts no more
    stamp: list[int] | None
    types: dict[str, str]  # Polars' types of the table's columns
    typed: bool  # whether the file itself says them: in CSV all is text
    ignored: list[str]  # columns that no key asks for
    rows: int = 0  # that stand in the copy
    left_out: int = 0  # of players who were forgotten
    lost: list[str] = field(default_factory=list)  # keyed hashes of the ids of the decisions among these
    unread: dict[str, int] = field(default_factory=dict)  # values that could not be read as their column's type, by column
    broken: int = 0  # lines that are no rows


@dataclass(frozen=True)
class Segment:
    """Partitions that were staged together; a row's `?file` is its partition's place among them. `pieces`: the Arrow files of each part."""

    name: str
    pieces: list[int]
    partitions: list[Partition]

    @property
    def parts(self) -> int:
        return len(self.pieces)

    def files(self, directory: Path, part: int) -> list[Path]:
        return [directory / self.name / f"{part}-{piece}.arrow" for piece in range(self.pieces[part])]


@dataclass(frozen=True, eq=False)
class Mark:
    """Somebody reads a segment, for as long as this is held and its process lives."""

    segment: Path


@dataclass(frozen=True)
class Staged:
    """All rows of a log in canonical types, on disk.

    Beside the table's columns stand `?file` (index into `files`), `?row` (from 1, blank lines left out), `?others` (a hash of the ignored
    columns, where asked for), where a value had the wrong type its text in `unread(column)`, and if any line is no row `?broken`: why, null for the rows.
    """

    directory: Path
    columns: Mapping[str, Column]
    by: str  # the column whose hash decides on a row's part
    files: list[str]  # in the order of their names, which is the order of the rows
    partitions: list[Partition]  # of `files`
    read: list[str]  # what was read this time
    noticed: list[str]  # a sentence for each file that has changed or gone since it was last read
    live: list[tuple[Segment, dict[int, int]]]  # of each segment the partitions that count, by their place there, and their place in `files`
    marks: list[Mark]  # of each segment, which stays while its rows may be read

    @property
    def found(self) -> set[str]:
        """Columns that at least one file has."""
        return {column for partition in self.partitions for column in partition.types}

    @property
    def ignored(self) -> list[str]:
        """Columns that no key asks for."""
        return list(dict.fromkeys(column for partition in self.partitions for column in partition.ignored))

    @property
    def kinds(self) -> list[int]:
        """By file a number, the same where the ignored columns are: only there `?others` can be compared."""
        ignored = [(partition.typed, sorted(partition.ignored)) for partition in self.partitions]
        return [ignored.index(one) for one in ignored]

    @property
    def unread(self) -> frozenset[str]:
        """Columns with values of the wrong type."""
        return frozenset(column for partition in self.partitions for column, number in partition.unread.items() if number)

    @property
    def broken(self) -> bool:
        """Whether there are lines that are no rows."""
        return any(partition.broken for partition in self.partitions)

    @property
    def rows(self) -> int:
        return sum(partition.rows for partition in self.partitions)

    @property
    def left_out(self) -> int:
        """Rows of players who were forgotten, which are not in the copy."""
        return sum(partition.left_out for partition in self.partitions)

    @property
    def lost(self) -> frozenset[str]:
        """Keyed hashes of the ids of decisions that are not in the copy."""
        return frozenset(lost for partition in self.partitions for lost in partition.lost)

    @property
    def parts(self) -> int:
        return max(segment.parts for segment, _ in self.live)

    def mine(self, part: int) -> pl.Expr:
        """Which rows, wherever they come from, belong to a part."""
        return pl.col(self.by).hash() % self.parts == part

    def part(self, part: int) -> pl.LazyFrame:
        """The rows of one part, in the order of `files`."""
        frames, last, in_order = [], -1, True
        for (segment, places), mark in zip(self.live, self.marks, strict=True):
            frame = _mapped(segment.files(self.directory, part % segment.parts), mark)
            if segment.parts != self.parts:  # both are powers of two, so a part here lies in one part there
                frame = frame.filter(self.mine(part))
            if len(places) < len(segment.partitions):
                frame = frame.filter(pl.col(FILE).is_in(list(places)))
            if any(there != here for there, here in places.items()):
                frame = frame.with_columns(pl.col(FILE).replace_strict(places, return_dtype=pl.UInt32))
            here = list(places.values())
            in_order &= here == sorted(here) and here[0] > last
            last = here[-1]
            frames.append(frame)
        rows = pl.concat(frames, how="diagonal") if len(frames) > 1 else frames[0]
        kept = {*self.columns, *map(unread, self.unread), *[BROKEN] * self.broken, FILE, ROW, OTHERS}
        present = rows.collect_schema().names()
        types = {c: DTYPES[column.kind] for c, column in self.columns.items()} | ({BROKEN: pl.String()} if self.broken else {})
        absent = [pl.lit(None, dtype).alias(c) for c, dtype in types.items() if c not in present]
        rows = rows.select(c for c in present if c in kept).with_columns(absent)
        return rows if in_order else rows.sort(FILE, ROW)


def stage(
    workspace: Workspace,
    table: str,
    source: str | Logs.Query,
    key: str,
    columns: Mapping[str, Column],
    by: str,
    *,
    apart: bool = False,
    lost: frozenset[str] = frozenset(),
    since: tuple[str, datetime] | None = None,
) -> Staged:
    """Bring the copy of a log up to date: files that are new or have changed are read, in one streamed pass.

    `key` is the setting that names `source`, `by` the column that decides on a row's part; `apart` keeps a hash of the ignored columns,
    for rows that differ in nothing else. Left out are players who were forgotten or, of a log that does not name them, their decisions (`lost`, by keyed
    hash). With `since`, files that were not read before are left for another time where they say that all their times in that column are earlier.
    The copy is replaced whole or not at all.
    Raises `LogsError` that names file and column where something cannot be read, a column is missing or its type is not what it should
    be, or not that of the other files, or not what it was the last time; `WorkspaceError` where the copy cannot be written.
    """
    sources = sources_of(workspace.root, key, source)
    with workspace.lock("staged", wait_seconds=600):
        workspace.make(workspace.staged / table)
        gone = forgotten(workspace)  # under the lock: whoever is forgotten from here on is struck from the copy when it is there
        left_out = gone if "player_id" in columns else replace(gone, hashes=lost)
        return _staged(workspace, table, sources, columns, by, left_out, sorted(gone.hashes), apart=apart, since=since)


def _staged(
    workspace: Workspace,
    table: str,
    sources: list[Source],
    columns: Mapping[str, Column],
    by: str,
    without: Forgotten,
    players: list[str],
    *,
    apart: bool,
    since: tuple[str, datetime] | None,
) -> Staged:
    directory = workspace.staged / table
    meaning = [{c: asdict(what) for c, what in columns.items()}, by, apart, pl.__version__, sorted(without.hashes)]
    layout = hashlib.sha256(json.dumps(meaning).encode()).hexdigest()
    segments, types = _read_state(directory, layout)
    known = {partition.name: partition for segment in segments for partition in segment.partitions if partition.name}
    if since is not None:
        wanted = [source for source in sources if source.name in known or not wholly_before(source, *since)]
        sources = wanted or sources[-1:]
    stamps = {source.name: source.stamp for source in sources}
    same = {name for name, partition in known.items() if partition.stamp is not None and stamps.get(name) == partition.stamp}
    several = len(known) > 1  # one file alone is exported anew, and larger, each time
    changed = [name for name in stamps if name in known and name not in same and known[name].stamp is not None and several]
    noticed = [f"{name} has changed since it was last read; all of it was read again" for name in changed]
    gone = [name for name in known if name not in stamps]
    noticed += [f"{name} is gone; its rows count no more" for name in gone if several]
    if len(segments) >= MOST_SEGMENTS:
        segments, same = [], set()
    new = [source for source in sources if source.name not in same]

    by_lines = set[str]()
    while new:
        try:
            opened = [_opened(workspace.root, source, i, columns, by, without, apart=apart, lines=source.name in by_lines) for i, source in enumerate(new)]
            frames, partitions = [frame for frame, _ in opened], [partition for _, partition in opened]
            _alike([known[name] for name in stamps if name in same], partitions, types, directory)
            parts = _parts(sum(stamp[0] for stamp in stamps.values() if stamp), segments)
            segments = [*segments, _written(directory, frames, partitions, columns, by, parts)]
            break
        except UnreadableError:
            hurt = {source.name for source in new if source.has_lines and source.name not in by_lines and not _readable(workspace.root, source)}
            if not hurt:
                raise
            by_lines |= hurt
    place = {name: i for i, name in enumerate(stamps)}
    newest = {partition.name: (s, i) for s, segment in enumerate(segments) for i, partition in enumerate(segment.partitions)}
    live = []
    for s, segment in enumerate(segments):
        places = {i: place[partition.name] for i, partition in enumerate(segment.partitions) if newest[partition.name] == (s, i) and partition.name in place}
        if places:
            live.append((segment, places))
    standing = {places[i]: segment.partitions[i] for segment, places in live for i in places}
    ordered = [standing[i] for i in range(len(place))]
    if new or gone:
        _write_state(directory, layout, players, live, types | _types(ordered))
    marks = [_marked(directory / segment.name) for segment, _ in live]
    return Staged(directory, columns, by, list(place), ordered, [source.name for source in new], noticed, live, marks)


def _opened(
    root: Path, source: Source, place: int, columns: Mapping[str, Column], by: str, without: Forgotten, *, apart: bool, lines: bool
) -> tuple[pl.LazyFrame, Partition]:
    """The rows of a file in canonical types, its `place` beside them, and what is known of it before it is read; `lines`: it is read by line."""
    scan = by_line(source, columns) if lines else source.scan(root)
    with naming(source.name):
        schema = scan.collect_schema()
    others = [c for c in schema.names() if c not in columns and c != BROKEN]
    # two events may differ only in a column that is of no other use, such as an event's own id
    beside = [pl.struct(others).hash().alias(OTHERS)] if others and apart else []
    beside += [pl.col(BROKEN)] * (BROKEN in schema)
    with naming(source.name):
        selected = [*selection(source.name, columns, scan), *beside, pl.lit(place, pl.UInt32).alias(FILE), pl.col(ROW)]
    frame = scan.with_row_index(ROW, 1).select(selected)
    with naming(source.name):
        frame, left_out, lost = _without(frame, "player_id" if "player_id" in columns else by, by, without)
    said = {c: str(schema[c]) for c in columns if c in schema}
    typed = not lines and format_of(source.name) != "CSV"
    return frame, Partition(source.name, source.stamp, said, typed, others, left_out=left_out, lost=lost)


def _readable(root: Path, source: Source) -> bool:
    """Whether Polars can read all of a file."""
    try:
        with naming(source.name):
            source.scan(root).select(pl.all().null_count()).collect(engine="streaming")
    except UnreadableError:
        return False
    return True


def _without(frame: pl.LazyFrame, who: str, by: str, gone: Forgotten) -> tuple[pl.LazyFrame, int, list[str]]:
    """The rows of a file but those of ids in the column `who` that were forgotten; how many those are and, where they have another key, its keyed hashes."""
    if not gone:
        return frame, 0, []
    ids = frame.select(pl.col(who).unique()).collect(engine="streaming").to_series()
    theirs = pl.col(who).is_in(ids.filter(gone.holds(ids)).implode()).fill_null(value=False)
    left = frame.filter(theirs).select(by).collect(engine="streaming").to_series()
    if left.is_empty():
        return frame, 0, []
    # Arrow's texts point into buffers that a filter leaves whole, and that would be written so: copy those that stay
    texts = [pl.concat_str(pl.col(c), pl.lit("")).alias(c) for c, dtype in frame.collect_schema().items() if dtype == pl.String]
    return frame.filter(~theirs).with_columns(texts), len(left), [gone.keyed(i) for i in left.drop_nulls()] if by != who else []


def _parts(size: int, segments: list[Segment]) -> int:
    """A power of two, so that a finer division divides each part of a coarser one."""
    wanted = 1 << max(0, math.ceil(math.log2(max(size, 1) / PART_BYTES)))
    return min(max(wanted, *(segment.parts for segment in segments), 1), MOST_PARTS)


# ---- types of columns, between files and between runs -----------------------------------------------------------------


def _family(dtype: str) -> str | None:
    """What two types must share for a column to be of one type: numbers of any width are alike. None: nothing is known."""
    if dtype.startswith(("Int", "UInt", "Float", "Decimal", "Boolean")):
        return "numbers"
    if dtype.startswith(("String", "Categorical", "Enum")):
        return "text"
    return "times" if dtype.startswith(("Date", "Time", "Duration")) else None


def _types(partitions: list[Partition]) -> dict[str, list[str]]:
    """By column: its type, and the first file that says it."""
    found: dict[str, list[str]] = {}
    for partition in partitions:
        for column, dtype in partition.types.items() if partition.typed else ():
            if _family(dtype):
                found.setdefault(column, [dtype, partition.name])
    return found


def _alike(before: list[Partition], new: list[Partition], last: dict[str, list[str]], directory: Path) -> None:
    """Raise `LogsError` where a column's type differs between two files, or from what it was when it was last read."""
    here = _types([*before, *new])
    for partition in new:
        for column, (dtype, name) in _types([partition]).items():
            other, where = here[column]
            if _family(other) != _family(dtype):
                raise LogsError(f"{name}: column {column!r} is of type {dtype}, but in {where} of type {other}; write it alike in both")
            other, where = last.get(column, [dtype, name])
            if _family(other) != _family(dtype):
                mend = f"write it as before or, if it is meant, delete {directory} once"
                raise LogsError(f"{name}: column {column!r} is of type {dtype}, but was of type {other} when {where} was last read; {mend}")


# ---- on disk ----------------------------------------------------------------------------------------------------------


def _written(directory: Path, frames: list[pl.LazyFrame], partitions: list[Partition], columns: Mapping[str, Column], by: str, parts: int) -> Segment:
    """Stream the frames into the files of a new segment. A column most of whose values could not be read is of the wrong type."""
    name = uuid.uuid4().hex
    made = directory / name
    made.mkdir()
    part = (pl.col(by).hash() % parts).cast(pl.UInt16).alias("?part")
    to = pl.PartitionBy(made, key=part, include_key=False, file_path_provider=lambda at: f"{at.partition_keys.item()}-{at.index_in_partition}.arrow")
    try:
        rows = pl.concat(frames, how="diagonal")
        # a quarter less work than Parquet, and read without copying; in batches, for what is not yet one is held in memory, of each part
        rows.sink_ipc(to, compression="uncompressed", record_batch_size=BATCH_ROWS)
        pieces = [len(list(made.glob(f"{part}-*.arrow"))) for part in range(parts)]
        for empty in (part for part in range(parts) if not pieces[part]):
            pl.DataFrame(schema=rows.collect_schema()).write_ipc(made / f"{empty}-0.arrow")
        segment = Segment(name, [max(number, 1) for number in pieces], partitions)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        shutil.rmtree(made, ignore_errors=True)
        if is_full(error):
            raise WorkspaceError(f"{directory}: the disk is full; nothing was changed; free some space and run the command again") from None
        for partition, frame in zip(partitions, frames, strict=True):
            with naming(partition.name):  # whose fault it is
                frame.select(pl.all().null_count()).collect(engine="streaming")
        raise
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return replace(segment, partitions=_counted(directory, segment, columns))


def _mapped(files: list[Path], mark: Mark) -> pl.LazyFrame:
    """Arrow files as they lie in the page cache; Polars' own reader copies them. The mark is held for as long as they may be read."""

    def read() -> pl.DataFrame:
        with _there(mark):
            return pl.concat([pl.DataFrame(pl.from_arrow(pa.ipc.open_file(pa.memory_map(str(file))).read_all())) for file in files], how="diagonal")

    with _there(mark):
        return pl.defer(read, schema=pl.Schema(pl.read_ipc_schema(files[0])), validate_schema=False)


@contextlib.contextmanager
def _there(mark: Mark) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise WorkspaceError(f"{mark.segment}: this copy of the logs was removed, for a player was forgotten; run the command again") from None


def _marked(segment: Path) -> Mark:
    with room(segment):
        descriptor = os.open(segment / _MARK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    mark = Mark(segment)
    weakref.finalize(mark, os.close, descriptor)
    return mark


def _is_read(segment: Path) -> bool:
    """Whether anybody is at it still."""
    if not (segment / _MARK).exists():
        return False
    with (segment / _MARK).open("rb") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _counted(directory: Path, segment: Segment, columns: Mapping[str, Column]) -> list[Partition]:
    """The partitions of a segment with their rows and their unread values."""
    scan = pl.scan_ipc([file for part in range(segment.parts) for file in segment.files(directory, part)], glob=False)
    present = scan.collect_schema().names()
    texts = {unread(c): c for c in columns if unread(c) in present}
    counts = [pl.col([*texts, *texts.values()]).count()] if texts else []
    counts += [pl.col(BROKEN).count()] * (BROKEN in present)
    by_file = {row[FILE]: row for row in scan.group_by(FILE).agg(pl.len().alias("?rows"), *counts).collect(engine="streaming").to_dicts()}
    counted = []
    for i, partition in enumerate(segment.partitions):
        row = by_file.get(i, {"?rows": 0})
        lost = {column: row[text] for text, column in texts.items() if row.get(text)}
        for column, number in lost.items():
            if number > row[column]:
                example = scan.filter((pl.col(FILE) == i) & pl.col(unread(column)).is_not_null()).select(unread(column)).head(1).collect().item()
                expected, mend = EXPECTED[columns[column].kind]
                shutil.rmtree(directory / segment.name, ignore_errors=True)
                raise LogsError(f"{partition.name}: column {column!r} holds values such as {example[:60]!r}, expected {expected}; {mend}")
        counted.append(replace(partition, rows=row["?rows"], unread=lost, broken=row.get(BROKEN, 0)))
    return counted


def strike(workspace: Workspace) -> int:
    """Remove copies that were made before the last player was forgotten: the next reading makes them anew. Returns the number of files."""
    removed = 0
    with workspace.lock("staged", wait_seconds=600):
        now = sorted(forgotten(workspace).hashes)
        for directory in workspace.staged.iterdir() if workspace.staged.exists() else ():
            try:
                if json.loads((directory / _STATE).read_text(encoding="utf-8"))["players"] == now:
                    continue
            except (OSError, ValueError, KeyError, TypeError):
                pass  # whatever it was made of, it goes
            removed += strike_arrays(directory, ["*.arrow"])
    return removed


def _read_state(directory: Path, layout: str) -> tuple[list[Segment], dict[str, list[str]]]:
    """The segments that were staged in this layout, and the types that columns had when they were last read; none, where anything is amiss."""
    try:
        state = json.loads((directory / _STATE).read_text(encoding="utf-8"))
        if state["layout"] != layout:
            return [], {}
        segments = [Segment(s["name"], s["pieces"], [Partition(**p) for p in s["partitions"]]) for s in state["segments"]]
        whole = [segment for segment in segments if all(f.exists() for part in range(segment.parts) for f in segment.files(directory, part))]
        return whole, state["types"]
    except (OSError, ValueError, KeyError, TypeError):
        return [], {}


def _write_state(directory: Path, layout: str, players: list[str], live: list[tuple[Segment, dict[int, int]]], types: dict[str, list[str]]) -> None:
    """Note what counts now, and remove what does not, unless a reader that began before is still at it."""
    try:
        # of another layout nothing is kept for readers: it may hold somebody who was forgotten since
        alike = json.loads((directory / _STATE).read_text(encoding="utf-8"))["layout"] == layout
    except (OSError, ValueError, KeyError, TypeError):
        alike = False
    now = [replace(s, partitions=[p if i in places else replace(p, name="") for i, p in enumerate(s.partitions)]) for s, places in live]
    state = {"layout": layout, "players": players, "segments": [asdict(segment) for segment in now], "types": types}
    with replacing(directory / _STATE) as partial:
        partial.write_text(json.dumps(state), encoding="utf-8")
    standing = {segment.name for segment in now}
    for found in directory.iterdir():
        if found.is_dir() and found.name not in standing and not (alike and _is_read(found)):
            shutil.rmtree(found, ignore_errors=True)
