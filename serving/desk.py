"""One process's desk: the requests that wait for a batch and for the disk, and what is kept up to date beside them.

Requests that arrive while a batch is computed become the next batch, so nothing waits for a timer and the event loop never blocks
longer than one batch. An answer leaves only when its decisions are on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from fastapi import Request
from starlette.responses import Response

from fastq.assignment import excluded_players
from fastq.errors import FastqError
from fastq.platform import Platform
from serving import online
from serving.auth import Keys
from serving.decision_log import PATIENCE, Decision, LogUnavailable, open_log
from serving.decision_log import Request as Repeatable
from serving.metrics import Metrics
from serving.online import Ask, NotReady, Service, StoreUnavailable
from serving.refusals import Overloaded, TooOften

logger = logging.getLogger("fastq.serving")
BATCH_ROWS = 256  # players that one batch takes on the event loop; larger requests go to a thread
TOGETHER = 32  # requests that wait for nothing: nobody else to come, no disk, no rest
MOST_UNDER_WAY = 192  # requests that wait for a batch or for the disk; one more is refused at once, which is kinder than an answer that comes too late
MOST_TURNS = 16  # explanations, or queries, that wait for others of their kind
FOLLOW_SECONDS = 1.0  # how often the registry is asked for the champion
REFUSED_SECONDS = 60.0  # until a model that could not be loaded is tried again: what ailed it may have passed
ELSEWHERE_SECONDS = 0.003  # until it is tried again whether another replica is done with a player
NOBODY = "\x00"  # a player who cannot be: asked for to see whether the store answers


@dataclass
class Waiting:
    """A request that waits for a batch, then for the disk; `keep`: its decisions go into the log, under `request` if it can be repeated."""

    ask: Ask
    keep: bool
    request: Repeatable | None
    future: asyncio.Future[list[Decision]]
    decided: list[Decision] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    def end(self, result: list[Decision] | BaseException) -> None:
        if self.future.done():  # its caller went away
            return
        if isinstance(result, BaseException):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


@dataclass
class Desk:
    """What the routes share: the service once it is open, the keys, the metrics, and the requests that wait for the next batch."""

    platform: Platform
    keys: Keys
    metrics: Metrics
    service: Service | None = None
    waiting: deque[Waiting] = field(default_factory=deque)
    under_way: int = 0
    flushing: bool = False  # a batch is about to be made, or being made
    rested: float = 0.0  # when the next batch may begin
    committing: int = 0  # batches on their way to the disk
    probed_at: float = -1e9
    probed: str | None = "not yet looked at"
    direct: dict[str, Callable[[Request], Awaitable[Response]]] = field(default_factory=dict)  # routes that the gate opens itself
    apart: set[asyncio.Task[None]] = field(default_factory=set)  # large requests, each in a thread
    busy: set[str] = field(default_factory=set)  # players of whom a decision is on its way to the disk, where what they may have is capped
    buckets: dict[str, tuple[float, float]] = field(default_factory=dict)  # key id -> requests it may make at once, and when that was so
    refused: dict[str, float] = field(default_factory=dict)  # version -> when it could not be taken into service
    excluded_at: int | None = None  # what the file of excluded players had last changed when it was read

    def open(self) -> Service:
        if self.service is None:
            raise NotReady("the server is starting or stopping; ask again in a moment")
        return self.service

    def admit_rate(self, key_id: str) -> None:
        """One request of a key, out of a bucket that holds a second's worth. Raises `TooOften`."""
        rate = self.platform.serving.rate_limit
        if rate == 0:
            return
        most, now = max(rate, 1.0), time.monotonic()
        left, since = self.buckets.get(key_id, (most, now))
        left = min(most, left + rate * (now - since))
        if left < 1:
            self.metrics.refused.labels("rate").inc()
            raise TooOften(f"this key may ask {rate:g} times per second (serving.rate_limit); ask again in {(1 - left) / rate:.1f} s")
        self.buckets[key_id] = (left - 1, now)

    def refused_lately(self, version: str) -> bool:
        """Whether a version could not be loaded within the last `REFUSED_SECONDS`."""
        return time.monotonic() - self.refused.get(version, -1e9) < REFUSED_SECONDS

    async def decide(self, ask: Ask, *, keep: bool, request: Repeatable | None = None) -> list[Decision]:
        """Decisions for one request, computed together with whatever else arrived meanwhile, and on disk if they are to be kept."""
        self.open()
        loop = asyncio.get_running_loop()
        if self.under_way >= MOST_UNDER_WAY:
            self.metrics.refused.labels("overload").inc()
            raise Overloaded("too many requests wait already; ask again in a moment")
        entry = Waiting(ask, keep, request, loop.create_future())
        self.under_way += 1
        try:
            self.waiting.append(entry)
            self._next()
            return await entry.future
        finally:
            self.under_way -= 1

    def _next(self) -> None:
        """Begin the next batch, unless one goes on: then those who come meanwhile are the next, together.

        Most of what a batch costs it costs whatever its size, so a few large ones serve more than many small ones. While a batch is on its way to the
        disk the next is not computed, since both would have to share the interpreter; and after one that held several requests the loop takes as long for
        other things. As many as `TOGETHER` wait for neither, and one who is alone never waits.
        """
        if self.waiting and not self.flushing and (not self.committing or len(self.waiting) >= TOGETHER):
            self.flushing = True
            loop = asyncio.get_running_loop()
            wait = self.rested - time.perf_counter()
            if wait > 0 and len(self.waiting) < TOGETHER:
                loop.call_later(wait, self._gather, 0)
            else:
                loop.call_soon(self._gather, 0)

    def _gather(self, before: int) -> None:
        """Let those who are just arriving come along: another turn of the loop for as long as each brings somebody; no timer, so one alone does not wait."""
        if len(self.waiting) > before and len(self.waiting) < TOGETHER:
            asyncio.get_running_loop().call_soon(self._gather, len(self.waiting))
        else:
            self._flush()

    def _flush(self) -> None:
        """One batch: as many waiting requests as fit."""
        batch: list[Waiting] = []
        later: list[Waiting] = []
        elsewhere: list[Waiting] = []
        rows = 0
        while self.waiting and (not batch or rows + len(self.waiting[0].ask) <= BATCH_ROWS):
            entry = self.waiting.popleft()
            if self.busy and self.busy.intersection(entry.ask.player_ids):
                later.append(entry)
                continue
            try:
                mine = self._occupy(entry)
            except (OSError, FastqError) as error:
                entry.end(error if isinstance(error, FastqError) else LogUnavailable(f"players cannot be kept apart among replicas ({error})"))
                continue
            if not mine:
                elsewhere.append(entry)
                continue
            if len(entry.ask) > BATCH_ROWS:  # it would hold everybody up
                self.apart.add(task := asyncio.get_running_loop().create_task(self._decide_apart(entry)))
                task.add_done_callback(self.apart.discard)
                continue
            batch.append(entry)
            rows += len(entry.ask)
        self.waiting.extendleft(reversed(later))
        if elsewhere:
            asyncio.get_running_loop().call_later(ELSEWHERE_SECONDS, self._again, elsewhere)
        if batch:
            self.metrics.batch.observe(rows)
            started = time.perf_counter()
            try:
                results: Sequence[list[Decision] | Exception] = online.decide(self.open(), [entry.ask for entry in batch])
            except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
                results = [error] * len(batch)
            took = time.perf_counter() - started
            self.metrics.stage.labels("decide").observe(took)
            self.rested = started + 2 * took if len(batch) > 1 else 0.0
            self._decided(batch, results)
        self.flushing = False
        if any(self.busy.isdisjoint(entry.ask.player_ids) for entry in self.waiting):  # the others are taken up when the disk has written
            self._next()

    async def _decide_apart(self, entry: Waiting) -> None:
        """A large request, in a thread of its own."""
        results: Sequence[list[Decision] | Exception]
        try:
            with self.metrics.stage.labels("decide").time():
                results = await asyncio.to_thread(online.decide, self.open(), [entry.ask])
        except Exception as error:  # noqa: BLE001 - as for a batch
            results = [error]
        self._decided([entry], results)

    def _decided(self, batch: Sequence[Waiting], results: Sequence[list[Decision] | Exception]) -> None:
        """Bring a batch's decisions to the disk: all in one piece, save for those that may have been made before."""
        together: list[Waiting] = []
        for entry, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                self._release([entry], result)
            elif not entry.keep:
                self.metrics.count(self.platform, result, dry_run=True)
                self._release([entry], None, result)
            else:
                entry.decided = result
                if entry.request is None:
                    together.append(entry)
                else:
                    self._append([entry], entry.request)
        if together:
            self._append(together, None)

    def _append(self, entries: list[Waiting], request: Repeatable | None) -> None:
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        decisions = [d for entry in entries for d in entry.decided]
        try:
            stored = self.open().log.append(decisions, request)
        except FastqError as error:
            self._release(entries, error)
            return
        self.committing += 1

        def on_disk(done: Future[list[Decision]]) -> None:
            self.committing -= 1
            self.metrics.stage.labels("log").observe(time.perf_counter() - started)
            error = done.exception()
            if error is None and (request is None or done.result() == decisions):
                self.metrics.count(self.platform, decisions, dry_run=False)
            self._release(entries, error, None if error or request is None else done.result())

        def wake(done: Future[list[Decision]]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(on_disk, done)

        stored.add_done_callback(wake)

    def _occupy(self, entry: Waiting) -> bool:
        """Where what players may have is capped: keep them to this request until its decisions are on disk. False where another replica has one of them."""
        if entry.keep and online.capped(self.platform):
            if not self.open().log.turns.take(entry.ask.player_ids):
                return False
            self.busy.update(entry.ask.player_ids)
        return True

    def _again(self, entries: list[Waiting]) -> None:
        """Requests that waited for another replica come first, unless they have waited for too long."""
        late = time.monotonic() - PATIENCE
        for entry in entries:
            if entry.since < late:
                entry.end(Overloaded("another replica has been deciding for one of these players for too long; ask again in a moment"))
        self.waiting.extendleft(reversed([entry for entry in entries if not entry.future.done()]))
        self._next()

    def _release(self, entries: Sequence[Waiting], error: BaseException | None, result: list[Decision] | None = None) -> None:
        """Let the callers go on."""
        for entry in entries:
            entry.end(error if error is not None else entry.decided if result is None else result)
        if self.busy:
            gone = self.busy.intersection(p for entry in entries if entry.keep for p in entry.ask.player_ids)
            self.busy -= gone
            if self.service is not None:  # else the process is about to end, and with it what it held
                self.service.log.turns.give(gone)
        self._next()

    async def readiness(self) -> dict[str, str]:
        """Champion, decision log and online store, each `ok` or what is wrong, really tried at most once a second."""
        service = self.service
        if service is None:
            return {"champion": "the server is starting or stopping", "log": "not open", "store": "not open", "paused": "not yet looked at"}
        if time.monotonic() - self.probed_at > 1:
            self.probed_at = time.monotonic()
            try:
                await asyncio.wait_for(asyncio.wrap_future(service.log.probe()), 5)
                self.probed = None
            except (FastqError, TimeoutError) as error:
                self.probed = str(error) or "the decision log does not answer within 5 s"
        try:
            await asyncio.to_thread(service.read, [NOBODY], 1)
            store = "ok"
        except StoreUnavailable as error:
            store = str(error)
        pause = service.pause
        return {
            "champion": "ok" if service.model else "no champion is loaded",
            "log": self.probed or "ok",
            "store": store,
            "paused": "no" if pause is None else pause.sentence,
        }


class Turns:
    """So many at a time; `MOST_TURNS` more may wait, for each of them holds one of the places at the door that recommendations need."""

    def __init__(self, desk: Desk, at_once: int) -> None:
        self._desk, self._free, self._waiting = desk, asyncio.Semaphore(at_once), 0

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A turn, when it comes. Raises `Overloaded`."""
        if self._free.locked() and self._waiting >= MOST_TURNS:
            self._desk.metrics.refused.labels("overload").inc()
            raise Overloaded("too many questions of this kind wait already; ask again in a moment")
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._free.release()


def follow(desk: Desk, stop: threading.Event) -> None:
    """Keep in service what the registry and fastq.yaml name: champion, challenger, excluded players; and bring waiting events into the online store.

    Each by itself: what fails is said once and tried again, and holds up none of the others. What was in service serves on.
    """
    from fastq import registry

    told: dict[str, str] = {}
    done: dict[str, object] = {}  # with which registry and model in service a step had nothing left to do
    while not stop.wait(FOLLOW_SECONDS):
        if (service := desk.service) is None:
            continue
        for what, step in (("champion", take_champion), ("challenger", take_challenger), ("excluded players", read_excluded), ("events", apply_events)):
            try:
                stamp, version = registry.stamp(desk.platform), service.model.version if service.model else None
                if stamp is None or done.get(what) != (stamp, version):
                    done[what] = (stamp, version) if step(desk, service) else None
                told.pop(what, None)
            except Exception as error:  # noqa: BLE001 - registry and store may fail in any way; serving goes on
                if (said := f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") != told.get(what):  # once, not every second
                    told[what] = said
                    logger.warning("%s: not brought up to date, what was there serves on: %s", what, said)


def take_champion(desk: Desk, service: Service) -> bool:
    """The registry's champion, where it is another one than the one in service. One that cannot be loaded is tried again after `REFUSED_SECONDS`.

    As `take_challenger`: whether nothing is left to do until the registry changes.
    """
    from fastq import registry

    wanted, before = registry.champion(desk.platform), service.model
    if wanted is not None and before is not None and wanted == before.version:
        return True
    if wanted is None or desk.refused_lately(wanted):
        return False
    try:
        service.model = online.load_model(desk.platform, wanted)
    except Exception:
        desk.refused[wanted] = time.monotonic()
        desk.metrics.refused_models.inc()
        raise
    show_model(desk, before.version if before else None)
    logger.info("model %s is in service", wanted)
    return True


def take_challenger(desk: Desk, service: Service) -> bool:
    """The challenger that fastq.yaml asks for, where it is another one than the one at work; as `take_champion`."""
    from fastq import registry

    if service.model is None:
        return False
    wanted = registry.challenger(desk.platform, service.model.version)
    if wanted == (service.challenger.version if service.challenger else None):
        return True
    if wanted is not None and desk.refused_lately(wanted):
        return False
    try:
        service.challenger = None if wanted is None else online.load_model(desk.platform, wanted)
    except Exception:
        desk.refused[str(wanted)] = time.monotonic()
        raise
    logger.info("challenger: %s", wanted or "none")
    return True


def read_excluded(desk: Desk, service: Service) -> None:
    """The file of excluded players, where it has changed."""
    if (changed := excluded_changed(desk.platform)) != desk.excluded_at:
        service.excluded, desk.excluded_at = excluded_players(desk.platform), changed


def apply_events(_: Desk, service: Service) -> None:
    """Waiting events into the online store; where that cannot be reached they wait on, which is no news."""
    with contextlib.suppress(StoreUnavailable):
        online.apply_activity(service)


def excluded_changed(platform: Platform) -> int | None:
    """What changes with the file of excluded players; None where there is none."""
    if platform.serving.exclude is None:
        return None
    try:
        return (platform.root / platform.serving.exclude).stat().st_mtime_ns
    except OSError:
        return None


def show_model(desk: Desk, before: str | None = None) -> None:
    """Let the metrics say which version is in service."""
    if before is not None:
        desk.metrics.model.labels(before).set(0)
    if desk.service is not None and desk.service.model is not None:
        desk.metrics.model.labels(desk.service.model.version).set(1)


@contextlib.asynccontextmanager
async def opened(desk: Desk) -> AsyncIterator[None]:
    """The service for as long as the app lives. A champion that cannot be loaded leaves the server up, not ready, and looking for one."""
    import torch

    torch.set_num_threads(1)  # requests are the parallelism here
    sys.setswitchinterval(0.0005)  # the log's thread must not wait 5 ms, Python's default, for the loop to let go of the interpreter
    log = await asyncio.to_thread(open_log, desk.platform)
    desk.excluded_at = excluded_changed(desk.platform)
    service = Service(desk.platform, log, None, excluded_players(desk.platform))
    service.timed = lambda stage, seconds: desk.metrics.stage.labels(stage).observe(seconds)
    try:
        service.model = await asyncio.to_thread(online.load_model, desk.platform)
    except FastqError as error:
        logger.error("no champion in service yet: %s", error)
    desk.service = service
    show_model(desk)
    stop = threading.Event()
    follower = threading.Thread(target=follow, args=(desk, stop), name="follow-champion", daemon=True)
    follower.start()
    if service.model is not None:
        try:
            service.challenger = await asyncio.to_thread(online.load_challenger, desk.platform, service.model.version)
        except FastqError as error:
            logger.error("no challenger at work yet: %s", error)
        with contextlib.suppress(FastqError):
            await asyncio.to_thread(online.warm, service)
    try:
        yield
    finally:
        stop.set()
        desk.service = None
        await asyncio.to_thread(follower.join, 10)
        await asyncio.to_thread(log.close)
