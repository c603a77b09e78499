"""Who decides for a player: the champion, the challenger, a behaviour policy, or nobody. One rule for the endpoint and for batches.

Shares are functions of the platform's and the player's names alone, so nobody ever changes sides, and each share is drawn independently of the
others. Whether fastq is paused stands in one small file of the workspace that servers look at again and again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import polars as pl

from fastq.errors import ConfigurationError, WorkspaceError
from fastq.platform import Platform
from fastq.workspace import Workspace, replacing


# ---- shares ----------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=200_000)
def place(platform: str, draw: str, player_id: str) -> float:
    """Where a player lies in [0, 1) in one of the platform's draws, uniformly over players."""
    digest = hashlib.sha256(f"{platform}/{draw}/{player_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def held_out(platform: Platform, player_id: str) -> bool:
    """Whether a player stays with the holdout's behaviour policy."""
    holdout = platform.serving.holdout
    return holdout.policy is not None and holdout.share > 0 and place(platform.platform, "holdout", player_id) < holdout.share


def challenged(platform: Platform, player_id: str) -> bool:
    """Whether a player who is not held out is served by the challenger."""
    share = platform.serving.challenger.share
    return share > 0 and place(platform.platform, "challenger", player_id) < share


def probability(platform: Platform, *, held: bool, by_challenger: bool = False, challenger: bool = True) -> float | None:
    """With which a player falls to whoever decides for them: the contract's `assignment`; None where nothing is drawn.

    `challenger`: whether there is one to fall to.
    """
    serving = platform.serving
    holdout = serving.holdout.share if serving.holdout.policy is not None else 0.0
    split = serving.challenger.share if challenger else 0.0
    if holdout == 0 and split == 0:
        return None
    if held:
        return holdout
    return (1 - holdout) * (split if by_challenger else 1 - split)


def excluded_players(platform: Platform) -> frozenset[str]:
    """Players who are never recommended anything: the column `player_id` of the file that `serving.exclude` names."""
    if platform.serving.exclude is None:
        return frozenset()
    path = platform.root / platform.serving.exclude
    try:
        frame = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path, infer_schema=False)
        return frozenset(frame["player_id"].cast(pl.String).drop_nulls())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ConfigurationError(f"{path}: serving.exclude: expected a file with a column player_id ({' '.join(str(error).split())[:200]})") from None


# ---- pause -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pause:
    """fastq decides for nobody: every player gets the proposal of `policy`, or the default action where there is none."""

    policy: str | None
    since: str  # RFC 3339
    who: str
    reason: str

    @property
    def sentence(self) -> str:
        return f"fastq is paused since {self.since} ({self.policy or 'no policy'} instead)"


def pause_of(workspace: Workspace) -> Pause | None:
    """The pause that is on, if one is. Raises `WorkspaceError` where the file that says so cannot be read: nobody may guess."""
    try:
        said = json.loads(workspace.paused.read_text(encoding="utf-8"))
        return Pause(said["policy"], said["since"], said["who"], said["reason"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkspaceError(f"{workspace.paused}: cannot be read ({error}); run `fastq pause` or `fastq resume` again") from None


def pause(platform: Platform, policy: str | None = None, *, who: str, reason: str = "") -> tuple[Pause, bool]:
    """From now on nobody gets a decision of fastq's; the pause that is on, and whether that is new. Audited, idempotent.

    `policy`: whose proposals are served, default the holdout's policy. Raises `ConfigurationError` for one that is none of the platform's.
    """
    workspace, chosen = Workspace(platform.root), policy or platform.serving.holdout.policy
    if chosen is not None and chosen not in platform.policies:
        raise ConfigurationError(f"--policy {chosen}: expected one of {', '.join(platform.policies)}")
    with workspace.lock("pause", wait_seconds=30):
        try:
            before = pause_of(workspace)
        except WorkspaceError:
            before = None  # a damaged file is replaced
        if before is not None and before.policy == chosen:
            return before, False
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        made = Pause(chosen, now, who, reason)
        workspace.record(who, "pause", policy=chosen, reason=reason)
        with replacing(workspace.paused) as partial:
            partial.write_text(json.dumps(asdict(made)), encoding="utf-8")
        return made, True


def resume(platform: Platform, *, who: str, reason: str = "") -> bool:
    """fastq decides again; whether it was paused. Audited, idempotent."""
    workspace = Workspace(platform.root)
    with workspace.lock("pause", wait_seconds=30):
        if not workspace.paused.exists():
            return False
        workspace.record(who, "resume", reason=reason)
        workspace.paused.unlink()
        return True
