"""Retraining by the clock and by drift, in the foreground of one machine.

Each retraining, look of the monitor and weekly `compact` runs in a process of its own (`python -m pipelines.schedule WORKSPACE retrain`), so that what it
leaks or dies of is not ours; what it came to is one line of JSON on its standard output. What was done last is kept in `schedule.json`: after a
stop a time that was missed is made up for once, and a stopped retraining goes on at the step where it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from fastq.errors import ConfigurationError, FastqError, GateRefused
from fastq.platform import FILE_NAME, Platform, load_platform
from fastq.workspace import Workspace, replacing
from pipelines.notify import notify

logger = logging.getLogger("fastq.schedule")

BACK_OFF = (60.0, 300.0, 1_500.0)  # seconds before each further try of what can heal
LONGEST_NAP = 30.0  # seconds: a clock that was set, or a machine that slept, is noticed within that
STOP_SECONDS = 60.0  # that a retraining is given to end after SIGTERM
LOOK_EVERY, COMPACT_EVERY = timedelta(hours=1), timedelta(days=7)
WAIT_FOR_ANOTHER = 12 * 3_600.0  # seconds for which a retraining waits for one that somebody else started


@dataclass(frozen=True)
class Clock:
    """The times of a cron expression in a time zone. `next_after` takes and gives UTC."""

    cron: str
    zone: ZoneInfo

    def next_after(self, moment: datetime) -> datetime:
        """The first time after `moment`: an hour that the zone leaves out in spring is made up for right after, one that comes twice in autumn counts once."""
        from cronsim import CronSim

        found: datetime = next(CronSim(self.cron, moment.astimezone(self.zone)))
        return found.astimezone(UTC)


def clock(cron: str, zone: str = "UTC") -> Clock:
    """Raises `ConfigurationError` where an expression or a zone can't be read, or no time ever fits."""
    from cronsim import CronSimError

    try:
        made = Clock(cron, ZoneInfo(zone))
        made.next_after(datetime.now(UTC))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigurationError(f"--timezone {zone}: expected a name such as UTC or Europe/Berlin") from None
    except (CronSimError, StopIteration) as error:
        raise ConfigurationError(f"--cron {cron!r}: expected minute, hour, day, month, weekday, as in '0 3 * * *' ({error or 'no such day'})") from None
    return made


# ---- what was done last --------------------------------------------------------------------------------------------------
def noted(workspace: Workspace) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((workspace.state / "schedule.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def note(workspace: Workspace, **said: Any) -> None:
    workspace.make()
    with replacing(workspace.state / "schedule.json") as partial:
        partial.write_text(json.dumps({**noted(workspace), **said}), encoding="utf-8")


def due(workspace: Workspace, times: Clock, cron: str, now: datetime) -> datetime:
    """The time that is to be kept next. One that passed while nobody kept it is due at once; of several the last one stands for all."""
    kept = noted(workspace)
    if kept.get("cron") != cron or kept.get("zone") != str(times.zone):
        return times.next_after(now)  # a new plan starts now
    planned = times.next_after(datetime.fromisoformat(kept["planned"]))
    if planned > now:
        following = times.next_after(times.next_after(now))
        return planned if planned <= following else times.next_after(now)  # a clock that was far ahead must not make us wait for the difference
    while (later := times.next_after(planned)) <= now:
        planned = later
    return planned


# ---- the loop ------------------------------------------------------------------------------------------------------------
def schedule(
    platform: Platform,
    cron: str,
    zone: str = "UTC",
    *,
    look: bool = True,
    say: Callable[[str], None] = logger.info,
    until: Callable[[], bool] = lambda: False,
    back_off: tuple[float, ...] = BACK_OFF,
) -> None:
    """Retrain at the times of `cron`, look for drift each hour, retrain on a finding, compact each week; until a signal, or `until` says so.

    Raises `ConfigurationError` for a cron expression or zone that can't be read, `WorkspaceError` where a schedule runs here already.
    """
    times, workspace = clock(cron, zone), Workspace(platform.root)
    with workspace.lock("schedule"):
        planned = due(workspace, times, cron, datetime.now(UTC))
        if noted(workspace).get("cron") != cron or noted(workspace).get("zone") != zone:
            note(workspace, cron=cron, zone=zone, planned=datetime.now(UTC).isoformat())
        if "compacted" not in noted(workspace):
            note(workspace, compacted=datetime.now(UTC).isoformat())
        compacted = datetime.fromisoformat(noted(workspace)["compacted"])
        say(f"{platform.platform}: next retraining at {planned:%Y-%m-%d %H:%M} UTC{'; a look for drift each hour' if look else ''}")
        if (workspace.runs / "turn.json").exists() or noted(workspace).get("drift"):
            say("a retraining was stopped here; it goes on where it was")
            work(platform, "retrain", say, back_off)
            note(workspace, drift=False)
        next_look = datetime.now(UTC) + timedelta(minutes=1) if look else None
        while not until():
            now = datetime.now(UTC)
            if now >= planned:
                note(workspace, planned=planned.isoformat())
                work(platform, "retrain", say, back_off)
                planned = due(workspace, times, cron, datetime.now(UTC))
                say(f"next retraining at {planned:%Y-%m-%d %H:%M} UTC")
            elif next_look is not None and not next_look - LOOK_EVERY <= now < next_look:  # also where the clock was set back
                next_look = now + LOOK_EVERY
                if not workspace.watched.exists():
                    continue  # before the first retraining there is nothing to compare with, which is nobody's failure
                if work(platform, "monitor", say, back_off).get("drift"):
                    note(workspace, drift=True)  # it is told once, and may be followed by our own end
                    say("drift was found; retraining")
                    work(platform, "retrain", say, back_off)
                    note(workspace, drift=False)
            elif now - compacted >= COMPACT_EVERY:
                compacted = now
                note(workspace, compacted=now.isoformat())
                work(platform, "compact", say, back_off)
            else:
                wake = min(planned, next_look) if next_look is not None else planned
                time.sleep(min(max((wake - now).total_seconds(), 0.05), LONGEST_NAP))
                planned = min(planned, due(workspace, times, cron, datetime.now(UTC)))


def work(platform: Platform, what: str, say: Callable[[str], None], back_off: tuple[float, ...] = BACK_OFF) -> dict[str, Any]:
    """Do one piece of work in a process of its own, again with back-off where it may heal; what came of it is told, and posted where it is bad news."""
    found = one_try(platform, what)
    for wait in back_off:
        if found.get("error") is None or not found.get("heals"):
            break
        say(f"{what}: {found['error']}; trying again in {wait:.0f} s")
        time.sleep(wait)
        found = one_try(platform, what)
    if found.get("error") is not None:
        say(f"{what} failed: {found['error']}")
        notify(platform, "failure", f"{what} failed: {found['error']}", found)
    elif what == "retrain":
        verdict = "is the champion" if found["promoted"] else "was not promoted"
        why = "; ".join(found["reasons"]) or "the gate let it pass"
        say(f"version {found['version']} {verdict}: {why}")
        if not found["promoted"]:
            notify(platform, "refusal", f"version {found['version'] or '(none)'} was not promoted: {'; '.join(found['reasons'])}", found)
    else:
        for finding in found.get("findings", []):
            say(finding["says"])
    return found


def one_try(platform: Platform, what: str) -> dict[str, Any]:
    """Run `what` in a child and give its answer; a child that died in whatever way has an `error` that may heal, for what is done stays done."""
    command = [sys.executable, "-m", "pipelines.schedule", str(platform.root), what]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, _ = child.communicate()
    except BaseException:  # our own end: the child writes down where it is, then we go
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        raise
    with contextlib.suppress(ValueError, IndexError):
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found
    return {"error": f"its process ended with {child.returncode}, without a word", "heals": child.returncode < 0}


# ---- in the child --------------------------------------------------------------------------------------------------------
def answer(root: str, what: str) -> dict[str, Any]:
    """What one piece of work came to; `error` and whether it `heals` where it came to nothing."""
    from pipelines.turn import may_heal

    try:
        platform = load_platform(Path(root) / FILE_NAME)
        if what == "monitor":
            from pipelines.monitor import monitor

            return monitor(platform)
        if what == "compact":
            from pipelines.compact import compact

            return compact(platform)
        from pipelines.retrain import retrain

        try:
            return retrain(platform, resume=True, wait_seconds=WAIT_FOR_ANOTHER)
        except GateRefused as refusal:
            return {"model": platform.platform, "version": None, "promoted": False, "reasons": refusal.reasons}
    except Exception as error:
        if not isinstance(error, FastqError):
            logger.exception("%s", what)
        return {"error": f"{error}" if isinstance(error, FastqError) else f"{type(error).__name__}: {error}", "heals": may_heal(error)}


def _main() -> None:
    from fastq.environment import prepare

    root, what = sys.argv[1:3]
    prepare(Workspace(Path(root)))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    kept = os.dup(1)
    os.dup2(2, 1)  # what libraries say is no part of the answer
    try:
        found = answer(root, what)
    except (KeyboardInterrupt, SystemExit):  # whoever stopped us knows
        sys.exit(128 + signal.SIGTERM)
    with os.fdopen(kept, "w", encoding="utf-8") as out:
        out.write(json.dumps(found, default=str) + "\n")


if __name__ == "__main__":
    _main()
