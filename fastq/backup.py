"""The whole workspace in one file while it runs, and back: consistent, checked, encrypted if a key is given, replaced whole or not at all.

A backup is a gzip-compressed tar of plain files: `fastq-backup.json` first (format, when, of which directory), then the files, then
`manifest.json` with a SHA-256 of each. SQLite files are copied by SQLite's own online backup, which sees one committed state while
others write; everything else here is written whole and renamed (`workspace.replacing`), so whatever is read is whole. Databases go
first: what they name was on disk before they named it.

With a key the same bytes are sealed as the age format seals a payload (STREAM, Hoang, Reyhanitabar, Rogaway and Vizár 2015): 64 KiB pieces under
ChaCha20-Poly1305, the nonce a counter and a mark of the last piece, so a piece that is changed, moved or cut off is noticed; key by scrypt.

A restore unpacks beside the old state, verifies everything, and only then changes names. The one point of no return is a journal
(`swap.json`): stopped before it the old state stands, stopped after it the next command finishes the renames.

The workspace notes where its backups lie (`backups.jsonl`). `expire` deletes those that are older than `operations.keep_backups`, all but the newest, which is
how a player who was forgotten leaves backups too: nothing else reaches into them.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import secrets
import shutil
import sqlite3
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from filelock import FileLock, Timeout

from fastq.errors import ConfigurationError, WorkspaceError
from fastq.forgetting import FILE as FORGOTTEN
from fastq.forgetting import Forgotten, forgotten
from fastq.platform import FILE_NAME
from fastq.workspace import FORMAT, STAGING, Workspace, finish_restore, format_of, fsync_directory, is_partial, json_lines, replacing, sweep

KEY_VARIABLE = "FASTQ_BACKUP_KEY"
SHORTEST_KEY = 16  # characters
VERSION = 1  # of the archive
HEAD, MANIFEST = "fastq-backup.json", "manifest.json"
MAGIC = b"fastq-sealed-1\n"
SALT, PIECE, TAG = 16, 64 * 1024, 16  # bytes
SQLITE = b"SQLite format 3\x00"
GZIP = b"\x1f\x8b"
LEFT_OUT = ("-wal", "-shm", "-journal", ".lock")  # of SQLite and of locks: nothing that outlives a process
RENAMED = ("experiments.artifact_location", "runs.artifact_uri", "logged_models.artifact_location", "model_versions.storage_location", "model_versions.source")


# ---- writing -----------------------------------------------------------------------------------------------------------
def backup(root: Path, target: Path, key: str | None = None, keep: timedelta | None = None) -> dict[str, Any]:
    """Write the workspace at `root` to `target`, which is replaced whole; `key` encrypts it. What runs may go on running. Then the old ones `expire`.

    Returns file, files, bytes (of the content), size (of the file), encrypted, expired (files). Raises `WorkspaceError` where there is no workspace or a file
    cannot be read.
    """
    root, target = root.resolve(), target.resolve()
    workspace = Workspace(root)
    if not (root / FILE_NAME).is_file():
        raise WorkspaceError(f"{root}: no {FILE_NAME} here, so this is no workspace; name its directory with --workspace")
    if target.is_dir():
        raise ConfigurationError(f"{target}: is a directory; expected the name of a file to be written")
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target.parent}: no such directory")
    digests: dict[str, dict[str, Any]] = {}
    workspace.make()
    # short renames of whole directories and aliases wait meanwhile; training and serving go on
    with workspace.lock("backup"), workspace.lock("tables", 120), workspace.lock("registry", 120), replacing(target) as partial:
        sweep(workspace)
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        workspace.append(workspace.backups, {"at": begun, "file": str(target)})  # before it is there: a note too many is nothing, a copy unknown would stay
        files = sorted(_files(root, {target, partial}), key=lambda found: (not found[1], found[0]))
        with contextlib.ExitStack() as open_files:
            out: IO[bytes] = open_files.enter_context(partial.open("wb"))
            if key is not None:
                out = cast("IO[bytes]", open_files.enter_context(_Sealing(out, key)))
            packed = open_files.enter_context(gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0))
            archive = open_files.enter_context(tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT))
            about = {"version": VERSION, "format": format_of(workspace), "root": str(root), "at": begun}
            _add(archive, HEAD, io.BytesIO(json.dumps(about).encode()), 0o600)
            for name, is_database in files:
                with _content(root / name, is_database, workspace) as content:
                    if content is not None:
                        digests[name] = _add(archive, name, content, 0o600)
            _add(archive, MANIFEST, io.BytesIO(json.dumps(digests).encode()), 0o600)
    fsync_directory(target.parent)
    return {
        "file": str(target),
        "files": len(digests),
        "bytes": sum(said["size"] for said in digests.values()),
        "size": target.stat().st_size,
        "encrypted": key is not None,
        "expired": expire(workspace, keep),
    }


def kept_backups(workspace: Workspace) -> list[dict[str, str]]:
    """The backups that were made here and still lie where they were written, oldest first: file, at (RFC 3339)."""
    newest = {line["file"]: line["at"] for line in json_lines(workspace.backups)}
    found = [{"file": file, "at": at} for file, at in newest.items() if _is_ours(Path(file))]
    return sorted(found, key=lambda one: one["at"])


def expire(workspace: Workspace, keep: timedelta | None, now: datetime | None = None) -> list[str]:
    """Delete the backups made here that are older than `keep`, all but the newest; returns which. None keeps all."""
    if keep is None:
        return []
    before = (now or datetime.now(UTC)) - keep
    old = [one["file"] for one in kept_backups(workspace)[:-1] if datetime.fromisoformat(one["at"]) < before]
    for file in old:
        Path(file).unlink(missing_ok=True)
    return old


def _is_ours(path: Path) -> bool:
    """Whether a file that is there is a backup, sealed or not."""
    try:
        with path.open("rb") as content:
            return content.read(len(MAGIC)) == MAGIC or _is_backup(path)
    except OSError:
        return False


def _files(root: Path, leave: set[Path]) -> Iterator[tuple[str, bool]]:
    """Every plain file below `root` with whether it is a database; links are never followed, nor is what only a running process needs or is yet to write."""
    for directory, inner, names in os.walk(root, followlinks=False):
        inner[:] = sorted(i for i in inner if i != STAGING and not (Path(directory) / i).is_symlink())
        for name in sorted(names):
            path = Path(directory) / name
            if path in leave or name.endswith(LEFT_OUT) or is_partial(path):
                continue
            try:
                if not stat.S_ISREG(path.lstat().st_mode):
                    continue
                with path.open("rb") as content:
                    start = content.read(len(SQLITE))
            except FileNotFoundError:  # renamed or removed meanwhile
                continue
            if not (start.startswith(MAGIC[: len(start)] or b"?") or (start.startswith(GZIP) and _is_backup(path))):
                yield path.relative_to(root).as_posix(), start == SQLITE


def _is_backup(path: Path) -> bool:
    with contextlib.suppress(OSError, EOFError), gzip.open(path) as content:
        return content.read(len(HEAD)) == HEAD.encode()
    return False


@contextlib.contextmanager
def _content(path: Path, is_database: bool, workspace: Workspace) -> Iterator[IO[bytes] | None]:
    """A file's bytes: for a database those of a snapshot; None where it has gone meanwhile."""
    if not is_database:
        try:
            content = path.open("rb")
        except FileNotFoundError:
            yield None
            return
        with content:
            yield content
        return
    descriptor, name = tempfile.mkstemp(prefix=".snapshot.", dir=workspace.state)
    os.close(descriptor)
    snapshot = Path(name)
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=60)) as live,
            contextlib.closing(sqlite3.connect(snapshot)) as copy,
        ):
            live.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
        with snapshot.open("rb") as content:
            yield content
    except sqlite3.Error as error:
        raise WorkspaceError(f"{path}: cannot be copied ({error}); fastq doctor says more") from None
    finally:
        snapshot.unlink(missing_ok=True)


def _add(archive: tarfile.TarFile, name: str, content: IO[bytes], mode: int) -> dict[str, Any]:
    """Add what the file holds now; one that grows meanwhile, as the audit log may, is taken as it was."""
    size = content.seek(0, os.SEEK_END)
    content.seek(0)
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, mode
    hashing = _Hashing(content)
    try:
        archive.addfile(entry, cast("IO[bytes]", hashing))
    except OSError as error:
        raise WorkspaceError(f"{name}: became shorter while it was read ({error}); try again") from None
    return {"size": size, "sha256": hashing.digest.hexdigest()}


class _Hashing:
    """A file that remembers the digest of what was read of it."""

    def __init__(self, content: IO[bytes]) -> None:
        self.content, self.digest = content, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        piece = self.content.read(size)
        self.digest.update(piece)
        return piece


# ---- sealing -----------------------------------------------------------------------------------------------------------
def key_from(file: Path | None) -> str | None:
    """The key of backups: the first line of `file`, else the environment's FASTQ_BACKUP_KEY, else None. It is never taken from the command line."""
    if file is not None:
        try:
            key: str | None = file.read_text(encoding="utf-8").split("\n", 1)[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"--key-file {file}: cannot be read ({error})") from None
    else:
        key = os.environ.get(KEY_VARIABLE)
    if key is not None and len(key) < SHORTEST_KEY:
        where = f"--key-file {file}" if file is not None else KEY_VARIABLE
        raise ConfigurationError(f"{where}: expected a key of at least {SHORTEST_KEY} characters, for example from: openssl rand -base64 32")
    return key


def _cipher(key: str, salt: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return ChaCha20Poly1305(Scrypt(salt=salt, length=32, n=2**16, r=8, p=1).derive(key.encode()))


def _nonce(piece: int, last: bool) -> bytes:
    return piece.to_bytes(11, "big") + bytes([last])


class _Sealing(io.RawIOBase):
    """A file to write to, whose pieces reach `out` sealed; the last one when it is closed."""

    def __init__(self, out: IO[bytes], key: str) -> None:
        salt = secrets.token_bytes(SALT)
        self._out, self._cipher, self._kept, self._pieces = out, _cipher(key, salt), bytearray(), 0
        out.write(MAGIC + salt)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._kept += data
        while len(self._kept) > PIECE:  # what is left is never empty, so the last piece is known to be the last
            self._seal(bytes(self._kept[:PIECE]), last=False)
            del self._kept[:PIECE]
        return len(data)

    def _seal(self, piece: bytes, *, last: bool) -> None:
        self._out.write(self._cipher.encrypt(_nonce(self._pieces, last), piece, MAGIC))
        self._pieces += 1

    def close(self) -> None:
        if not self.closed:
            self._seal(bytes(self._kept), last=True)
        super().close()


class _Unsealing(io.RawIOBase):
    """The plain bytes of a sealed file; raises `WorkspaceError` at the first piece that is not what was sealed."""

    def __init__(self, content: IO[bytes], key: str) -> None:
        self._content, self._cipher, self._pieces = content, _cipher(key, content.read(SALT)), 0
        self._next, self._kept = content.read(PIECE + TAG), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        from cryptography.exceptions import InvalidTag

        if not self._kept and self._next:
            piece, self._next = self._next, self._content.read(PIECE + TAG)
            try:
                self._kept = self._cipher.decrypt(_nonce(self._pieces, last=not self._next), piece, MAGIC)
            except InvalidTag:
                what = "the key is another one, or the file is damaged" if self._pieces == 0 else "the file is damaged or was cut off"
                raise WorkspaceError(f"this backup cannot be opened: {what}") from None
            self._pieces += 1
        size = min(len(buffer), len(self._kept))
        buffer[:size], self._kept = self._kept[:size], self._kept[size:]
        return size


# ---- reading -----------------------------------------------------------------------------------------------------------
def restore(root: Path, source: Path, key: str | None = None, *, overwrite: bool = False) -> dict[str, Any]:
    """Put the workspace of a backup into the directory `root`, which it may not hold one already unless `overwrite`.

    `fastq.yaml` and `.fastq/` become those of the backup; of the other files only those that are missing are written: newer logs stay.
    Whoever was forgotten since stays forgotten, and which backups there are stays known. Returns file, files, kept (files of the directory that stayed),
    made_at, root, forgotten (players who were forgotten since, and stand in what was restored). Raises `WorkspaceError` and leaves everything as it was
    where the backup is damaged, hostile, of a newer version or sealed with another key, or something of ours runs in `root`.
    """
    root = root.resolve()
    if not source.is_file():
        raise ConfigurationError(f"{source}: no such file")
    root.mkdir(parents=True, exist_ok=True)
    finish_restore(root)
    workspace = Workspace(root)
    living = [name for name in (FILE_NAME, workspace.state.name) if (root / name).exists()]
    if living and not overwrite:
        raise WorkspaceError(f"{root}: holds a workspace already ({', '.join(living)}); name another directory, or replace it with --overwrite")
    staging = root / STAGING
    with _nobody_else(workspace):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(mode=0o700)
        try:
            about, files = _unpack(source, key, staging)
            _moved(staging, str(about.get("root", "")), root)
            if (state := staging / "new" / workspace.state.name).exists():
                state.chmod(0o700)  # as `Workspace.make` makes it: what is written there later has no other guard
            since = _forgotten_since(workspace, Workspace(staging / "new"))
            put, kept = _swaps(root, staging, files)
            with replacing(staging / "swap.json") as partial:
                partial.write_text(json.dumps(put), encoding="utf-8")
            fsync_directory(staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finish_restore(root)
    return {"file": str(source), "root": str(root), "files": len(files), "kept": kept, "made_at": about["at"], "forgotten": since}


def _forgotten_since(now: Workspace, then: Workspace) -> int:
    """Write into a backup's workspace whom the one in its place has forgotten since, and which backups it knows; returns how many players that is.

    Under another salt than the backup's the newer hashes are the ones to keep: a workspace has one salt for its life.
    """
    ours = theirs = Forgotten(b"", frozenset())
    with contextlib.suppress(WorkspaceError):  # damaged: that is what is being mended
        ours, theirs = forgotten(now), forgotten(then)
    known = json_lines(then.backups)
    for line in json_lines(now.backups):
        if line not in known:
            then.append(then.backups, line)
    new = ours.hashes - theirs.hashes
    if new:
        tree = {"salt": ours.salt.hex(), "players": sorted(ours.hashes | (theirs.hashes if theirs.salt == ours.salt else frozenset()))}
        with replacing(then.state / FORGOTTEN) as partial:
            partial.write_text(json.dumps(tree), encoding="utf-8")
            partial.chmod(0o600)
    return len(new)


@contextlib.contextmanager
def _nobody_else(workspace: Workspace) -> Iterator[None]:
    """Hold every lock of the workspace that is there; raises where a process of ours still works in it."""
    with contextlib.ExitStack() as held:
        for path in sorted(workspace.state.rglob("*.lock")) if workspace.state.exists() else ():
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise WorkspaceError(
                    f"{workspace.root}: something still works here ({path.name} is held); stop fastq serve, schedule and retrain first"
                ) from None
            held.callback(lock.release, force=True)
        yield


def _unpack(source: Path, key: str | None, staging: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write every file below `staging/new` and verify it; returns what the archive says of itself, and its manifest."""
    found: dict[str, dict[str, Any]] = {}
    told: dict[str, dict[str, Any]] = {}
    about: dict[str, Any] = {}
    try:
        with contextlib.ExitStack() as open_files:
            content: IO[bytes] = open_files.enter_context(source.open("rb"))
            sealed = content.read(len(MAGIC)) == MAGIC
            if sealed and key is None:
                raise ConfigurationError(f"{source}: is encrypted; give its key by --key-file FILE or in the environment as {KEY_VARIABLE}")
            if sealed and key is not None:
                content = io.BufferedReader(_Unsealing(content, key), PIECE)
            else:
                content.seek(0)
            archive = open_files.enter_context(tarfile.open(fileobj=open_files.enter_context(gzip.GzipFile(fileobj=content, mode="rb")), mode="r|"))
            for i, entry in enumerate(archive):
                body = archive.extractfile(entry) if entry.isreg() else None
                if i == 0:
                    about = _about(source, entry.name, body)
                elif body is not None and entry.name == MANIFEST:
                    told = json.loads(body.read())
                else:
                    found[entry.name] = _write(staging / "new", entry, body)
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise WorkspaceError(f"{source}: is no backup of fastq, or is damaged ({' '.join(str(error).split())[:200]}); nothing was changed") from None
    if found != told:
        wrong = sorted(name for name in {*found, *told} if found.get(name) != told.get(name))
        raise WorkspaceError(f"{source}: damaged or incomplete: {', '.join(wrong[:5]) or 'the manifest'} is not what was backed up; nothing was changed")
    for name in found:
        _intact(staging / "new" / name)
    return about, found


def _about(source: Path, name: str, body: IO[bytes] | None) -> dict[str, Any]:
    if name != HEAD or body is None:
        raise ValueError(f"it does not start with {HEAD}")
    about: dict[str, Any] = json.loads(body.read())
    if about["version"] > VERSION or about["format"] > FORMAT:
        raise WorkspaceError(f"{source}: was written by a newer fastq (format {about['format']}, this one knows {FORMAT}); install that version")
    return about


def _write(directory: Path, entry: tarfile.TarInfo, body: IO[bytes] | None) -> dict[str, Any]:
    """One file; whatever is no plain file or would lie outside is refused."""
    parts = PurePosixPath(entry.name).parts
    if body is None or not parts or PurePosixPath(entry.name).is_absolute() or {"..", "", STAGING} & set(parts) or "\\" in entry.name or "\0" in entry.name:
        raise WorkspaceError(f"this backup names {entry.name!r}, which is no plain file inside a workspace; nothing was changed")
    if shutil.disk_usage(directory.parent).free < entry.size:
        raise WorkspaceError(f"{directory.parent}: no space left for {entry.name}; nothing was changed")
    path = directory.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as out:  # twice the same name is hostile too
        while piece := body.read(2**20):
            digest.update(piece)
            size += out.write(piece)
        os.fchmod(out.fileno(), 0o600)
        out.flush()
        os.fsync(out.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _intact(path: Path) -> None:
    with path.open("rb") as content:
        if content.read(len(SQLITE)) != SQLITE:
            return
    with contextlib.closing(sqlite3.connect(path)) as database:
        said = database.execute("PRAGMA quick_check").fetchone()[0]
    if said != "ok":
        raise WorkspaceError(f"{path.name}: the database in this backup is damaged ({said}); nothing was changed")


def _moved(staging: Path, before: str, root: Path) -> None:
    """Let MLflow find its files where the workspace is now: it keeps absolute paths."""
    database = staging / "new" / Workspace(Path()).mlflow / "mlflow.db"
    if not before or before == str(root) or not database.exists():
        return
    with contextlib.closing(sqlite3.connect(database)) as store, store:
        tables = {row[0] for row in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for place in RENAMED:
            table, column = place.split(".")
            if table in tables and column in {row[1] for row in store.execute(f"PRAGMA table_info({table})")}:
                for scheme in ("", "file://"):
                    start = f"{scheme}{before}/"
                    store.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",  # noqa: S608 - constants only
                        (f"{scheme}{root}/", len(start) + 1, len(start), start),
                    )


def _swaps(root: Path, staging: Path, files: dict[str, Any]) -> tuple[list[str], int]:
    """What is to be renamed into `root`, in order; and how many of the directory's own files stay as they are."""
    state = Workspace(root).state.name
    others = [name for name in files if PurePosixPath(name).parts[0] not in (FILE_NAME, state)]
    missing = [name for name in others if not (root / name).exists()]
    for name in missing:
        inside = (root / name).parent
        if any(p.is_symlink() for p in (inside, *inside.parents) if p.is_relative_to(root) and p != root):
            raise WorkspaceError(f"{name}: its directory is a link here, and restoring follows none; nothing was changed")
    first = [name for name in (FILE_NAME, state) if (staging / "new" / name).exists()]
    return [*missing, *first], len(others) - len(missing)
