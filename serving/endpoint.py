"""The endpoint: contract section 5 as a FastAPI app that answers in its own process, and needs no Ray to be tried.

Requests that arrive while a batch is computed become the next batch, so nothing waits for a timer and the event loop never blocks
longer than one batch. An answer leaves only when its decisions are on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from prometheus_client import Gauge, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastq.assignment import excluded_players
from fastq.errors import FastqError, RequestError, UnknownPlayerError
from fastq.features import NEVER, Columns, epoch_microseconds, microseconds
from fastq.platform import Platform
from fastq.workspace import Workspace
from serving import online, pages
from serving.auth import COOKIE, Caller, Keys, NotAllowed, NotSignedIn, Tokens
from serving.bodies import (
    Accepted,
    Asked,
    ExplanationRequest,
    Problem,
    QueryAnswer,
    QueryRequest,
    RecommendationRequest,
    Recommendations,
    activity_request,
    outcome_request,
    posted_events,
    reported_outcomes,
)
from serving.decision_log import PATIENCE, Decision, KeyReused, LogUnavailable, OutcomeConflict, UnknownDecisions, open_log
from serving.decision_log import Request as Repeatable
from serving.metrics import Metrics, ProxyRefusals, new_metrics
from serving.online import Ask, NotReady, Service, StoreUnavailable

if TYPE_CHECKING:
    from fastapi.types import DecoratedCallable

logger = logging.getLogger("fastq.serving")
Body = TypeVar("Body", bound=BaseModel)
MOST_BYTES = 16 * 2**20  # of a request's body
BATCH_ROWS = 256  # players that one batch takes on the event loop; larger requests go to a thread
TOGETHER = 32  # requests that wait for nothing: nobody else to come, no disk, no rest
MOST_UNDER_WAY = 192  # requests that wait for a batch or for the disk; one more is refused at once, which is kinder than an answer that comes too late
MOST_TURNS = 16  # explanations, or queries, that wait for others of their kind
MOST_KEY = 300  # characters of an Idempotency-Key
FOLLOW_SECONDS = 1.0  # how often the registry is asked for the champion
REFUSED_SECONDS = 60.0  # until a model that could not be loaded is tried again: what ailed it may have passed
QUERY_SECONDS = 20  # that an analyst's SQL may run
ELSEWHERE_SECONDS = 0.003  # until it is tried again whether another replica is done with a player
NOBODY = "\x00"  # a player who cannot be: asked for to see whether the store answers

OPEN = frozenset({"/healthz", "/readyz", "/metrics", "/openapi.json"})
RECOMMEND = frozenset({"/v1/recommendations", "/v1/outcomes", "/v1/activity"})  # every other route needs an analyst
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"),
]


# ---- one process's desk ----------------------------------------------------------------------------------------------------
class Overloaded(FastqError):
    """More requests wait than can be answered soon; this one was not begun."""


class TooOften(FastqError):
    """A key that asks more often than `serving.rate_limit` allows."""


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


STATUS: dict[type[FastqError], int] = {  # the first that an error is an instance of
    NotSignedIn: 401,
    NotAllowed: 403,
    UnknownDecisions: 404,
    UnknownPlayerError: 404,
    OutcomeConflict: 409,
    KeyReused: 422,
    RequestError: 422,
    TooOften: 429,
    Overloaded: 503,
    LogUnavailable: 503,
    NotReady: 503,
    StoreUnavailable: 503,
}


# ---- errors -----------------------------------------------------------------------------------------------------------------
def problem(status: int, detail: str, members: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """RFC 9457 problem details."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **(members or {})}
    more = {"Retry-After": "1"} if status in (429, 503) else {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return Response(orjson.dumps(body), status, {**more, **(headers or {})}, media_type="application/problem+json")


def refusal(error: Exception) -> Response:
    """The answer to an error that a route raised; nothing of the internals is in it."""
    if isinstance(error, RequestValidationError):
        return problem(422, "; ".join(_sentence(e) for e in error.errors()[:5]))
    if isinstance(error, HTTPException):
        detail = (
            error.detail
            if error.detail != HTTPStatus(error.status_code).phrase
            else {404: "there is nothing under this path; /openapi.json lists what there is", 405: "this path does not take this method"}.get(
                error.status_code, error.detail
            )
        )
        return problem(error.status_code, str(detail), headers=error.headers)
    for kind, status in STATUS.items():
        if isinstance(error, kind):
            members = {"ids": error.ids} if isinstance(error, UnknownDecisions) else {}
            return problem(status, str(error), members)
    if isinstance(error, FastqError):
        logger.error("%s: %s", type(error).__name__, error)
        return problem(503, "this cannot be answered now; the server's log says why")
    logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return problem(500, "something unexpected went wrong; the server's log says what")


def status_of(error: FastqError) -> int:
    """The HTTP status that says what an error means; 503 for what only the server's owner can mend."""
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 503)


def _sentence(error: Any) -> str:
    where = ".".join(str(step) for step in error["loc"] if step != "body" and not str(step).startswith(("function-", "list[", "dict[", "constrained-")))
    if error["type"] == "json_invalid":
        return f"the body is not JSON ({error.get('ctx', {}).get('error', 'cannot be read')})"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where or 'the body'}: {message[0].lower()}{message[1:]}"


def parsed(model: type[Body], raw: bytes, content_type: str | None) -> Body:
    """A request's body, read as `StrictJson` and `StrictRoute` have it. Raises `RequestValidationError`."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise RequestError(f"Content-Type: expected application/json, got {kind or 'none'}")
    try:
        return model.model_validate(orjson.loads(raw))
    except orjson.JSONDecodeError as error:
        raise RequestValidationError([{"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "ctx": {"error": error.msg}}]) from None
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from None


class StrictJson(Request):
    """Bodies read as RFC 8259 has JSON: no NaN, no infinity, UTF-8 alone, bounded depth."""

    async def json(self) -> Any:
        return orjson.loads(await self.body())


class StrictRoute(APIRoute):
    """A route whose body is `StrictJson`."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]  # FastAPI says Coroutine and awaits
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictJson(request.scope, request.receive))

        return strict


# ---- the gate ---------------------------------------------------------------------------------------------------------------
def guarded(app: ASGIApp, desk: Desk) -> ASGIApp:
    """Around everything: who asks and whether they may, the body's size, security headers, metrics, and no error without a problem."""

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        started, status, taken = time.perf_counter(), 500, 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ours = (dict(HEADERS) | pages.headers_of(scope["path"])).items() if pages.is_page(scope["path"]) else HEADERS
                message["headers"] = [*message.get("headers", []), *ours]
            await send(message)

        async def receiving() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > MOST_BYTES:
                    raise HTTPException(413, f"the body is larger than {MOST_BYTES // 2**20} MiB; send fewer rows at a time")
            return message

        try:
            refused = await admit(desk, scope)
            if refused is not None:
                await refused(scope, receive, sending)
            elif scope["method"] == "POST" and (handler := desk.direct.get(scope["path"])) is not None:  # without FastAPI's own detours
                answer = await handler(Request(scope, receiving))
                await answer(scope, receive, sending)
            else:
                await app(scope, receiving, sending)
        except Exception as error:  # the last door
            if status != 500:
                raise  # the answer has begun; only the connection can say that it failed
            await refusal(error)(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path_format", None) or (scope["path"] if scope["path"] in OPEN or scope["path"] in desk.direct else "other")
            desk.metrics.answered(route, scope["method"], status, time.perf_counter() - started)

    return gate


async def admit(desk: Desk, scope: Scope) -> Response | None:
    """None if the caller may go on (`scope["state"]["caller"]` says who it is), else the refusal."""
    path, raw = scope["path"], dict(scope["headers"])
    length = raw.get(b"content-length", b"")
    if length.isdigit() and int(length) > MOST_BYTES:
        return problem(413, f"the body is larger than {MOST_BYTES // 2**20} MiB; send fewer rows at a time")
    if path in OPEN or pages.needs_no_key(path, scope["method"]):
        return None
    try:
        authorization = raw[b"authorization"].decode("latin-1") if b"authorization" in raw else None
        if desk.keys.remote(authorization):  # the issuer's keys may have to be fetched
            caller = await asyncio.to_thread(desk.keys.verify, authorization)
        else:
            caller = desk.keys.verify(authorization, None if authorization else session_of(raw.get(b"cookie", b"").decode("latin-1")))
        caller.require("recommend" if path in RECOMMEND else "analyst")
        desk.admit_rate(caller.key_id)
    except NotSignedIn as error:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in raw.items()}
        if pages.is_page(path) and scope["method"] in {"GET", "HEAD"} and pages.is_browser(headers):
            query = scope.get("query_string", b"").decode("latin-1")
            return pages.sign_in(scope["app"].state.paper, f"{path}?{query}" if query else path, str(error) if session_of(headers.get("cookie", "")) else "")
        return refusal(error)
    except FastqError as error:
        return refusal(error)
    scope.setdefault("state", {})["caller"] = caller
    return None


def session_of(cookies: str) -> str | None:
    """The console's session token out of a Cookie header."""
    for part in cookies.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return None


def caller_of(request: Request) -> Caller:
    """Who the gate let in."""
    return cast("Caller", request.scope["state"]["caller"])


# ---- the app -----------------------------------------------------------------------------------------------------------------
class Endpoint(FastAPI):
    """FastAPI, whose middleware and routing are gone past by what is asked most often."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self.state.desk.direct:
            scope["app"] = self
            await self.state.straight(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(platform: Platform) -> FastAPI:
    """The endpoint of one platform; it opens the workspace when it starts and lets go of it when it stops."""
    issuer = platform.serving.tokens
    desk = Desk(platform, Keys(Workspace(platform.root), Tokens(issuer, platform.root) if issuer else None), new_metrics())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with opened(desk):
            yield

    app = Endpoint(title=f"fastq: {platform.platform}", version="1", docs_url=None, redoc_url=None, lifespan=lifespan, telemetry={"tracing": False})
    app.state.desk = desk
    app.router.route_class = StrictRoute
    app.add_middleware(guarded, desk=desk)
    app.state.straight = guarded(super(Endpoint, app).__call__, desk)
    for kind in (FastqError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, lambda _, error: refusal(error))
    failures: dict[int | str, dict[str, Any]] = {
        status: {"description": HTTPStatus(status).phrase, "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}
        for status in (400, 401, 403, 404, 409, 413, 422, 429, 503)
    }

    def route(
        method: Literal["get", "post"], path: str, answers: type[BaseModel] | None = None, body: type[Asked] | None = None
    ) -> Callable[[DecoratedCallable], DecoratedCallable]:
        documented: dict[int | str, dict[str, Any]] = dict(failures)
        if answers is not None:
            documented[200] = {"model": answers}

        def register(function: DecoratedCallable) -> DecoratedCallable:
            if body is not None:  # made for this platform, so no annotation can name it
                function.__annotations__["body"] = body
            return cast("DecoratedCallable", getattr(app, method)(path, responses=documented)(function))

        return register

    def reply(body: object, status: int = 200) -> Response:
        return Response(orjson.dumps(body), status, media_type="application/json")

    @app.post("/v1/recommendations", responses=dict(failures) | {200: {"model": Recommendations}})
    async def recommendations(request: Request) -> Response:
        """Decide for up to 1,000 players. Every decision is on disk before this answers, unless `dry_run`."""
        raw = await request.body()
        asked = parsed(RecommendationRequest, raw, request.headers.get("content-type"))
        ask, service = asked.ask(), desk.open()
        repeatable = None
        key = request.headers.get("idempotency-key")
        if key is not None and not asked.dry_run:
            if not 0 < len(key) <= MOST_KEY:  # an empty one would stand for every request that forgot to fill it in
                raise RequestError(f"Idempotency-Key: expected 1 to {MOST_KEY} characters")
            digest = hashlib.sha256(orjson.dumps(orjson.loads(raw), option=orjson.OPT_SORT_KEYS)).hexdigest()
            repeatable = Repeatable(f"{caller_of(request).key_id}:{key}", digest)
            if (earlier := service.log.repeated(repeatable)) is not None:
                return reply({"recommendations": [online.answer(platform, d) for d in earlier]})
        decided = await desk.decide(ask, keep=not asked.dry_run, request=repeatable)
        return reply({"recommendations": [online.answer(platform, d) for d in decided]})

    desk.direct["/v1/recommendations"] = recommendations

    @route("post", "/v1/outcomes", Accepted, outcome_request(platform))
    async def outcomes(body: Any) -> Response:
        """Report what followed; all of a request is stored, or nothing. The same again changes nothing."""
        log, reported = desk.open().log, reported_outcomes(platform, body)
        future = await asyncio.to_thread(log.report, reported, body.correct)
        accepted, already_known = await asyncio.wrap_future(future)
        desk.metrics.outcomes.labels("accepted").inc(accepted)
        desk.metrics.outcomes.labels("already_known").inc(already_known)
        return reply({"accepted": accepted, "already_known": already_known})

    @route("post", "/v1/activity", Accepted, activity_request(platform))
    async def activity(body: Any) -> Response:
        """New events; the next recommendation sees them. `degraded` says if the online store could not take them yet; they are kept and brought up later."""
        service = desk.open()
        accepted, already_known = await asyncio.wrap_future(service.log.record_activity(posted_events(platform, body)))
        desk.metrics.events.labels("accepted").inc(accepted)
        desk.metrics.events.labels("already_known").inc(already_known)
        degraded = None
        try:
            await asyncio.to_thread(online.apply_activity, service)
        except (StoreUnavailable, NotReady) as error:
            degraded = f"{error}; the events are stored and will be brought up as soon as it can be"
        return reply({"accepted": accepted, "already_known": already_known, "degraded": degraded})

    explaining = Turns(desk, 2)  # explanations are rare and long; they must not starve recommendations

    @route("post", "/v1/explanations")
    async def explanations(asked: ExplanationRequest) -> Response:
        """Why a past decision was made, with the model and the state of then; or what would be recommended to a player now, and why."""
        question, service = asked.question(), desk.open()
        async with explaining.one():
            with desk.metrics.stage.labels("explain").time():
                return reply(await asyncio.to_thread(online.explain_question, service, question))

    querying = Turns(desk, 1)  # a query takes a process and its memory

    @route("post", "/v1/query", QueryAnswer)
    async def query(asked: QueryRequest) -> Response:
        """One SELECT over decisions, outcomes, explanations and the like; read-only, limited in rows, seconds and memory."""
        from fastq import queries

        desk.open()
        async with querying.one():
            answer = await asyncio.to_thread(queries.ask, platform, asked.sql, seconds=QUERY_SECONDS)
            return reply(await asyncio.to_thread(answer.document))

    @route("get", "/v1/players/{player_id:path}")
    async def player(player_id: str) -> Response:
        """What is known of a player now."""
        return reply(await asyncio.to_thread(player_card, desk.open(), player_id))

    @route("get", "/v1/models")
    async def models() -> Response:
        """The registered versions with their aliases and the gate's verdicts."""
        from fastq import registry

        return reply({"models": await asyncio.to_thread(registry.models, platform)})

    @route("get", "/v1/decisions/{decision_id}")
    async def decision(decision_id: str) -> Response:
        """A decision that was served, what it was drawn from, and what has been reported of it."""
        return reply(await asyncio.to_thread(decision_card, desk.open(), decision_id))

    app.state.paper = pages.paper(platform)
    app.include_router(pages.router(desk, app.state.paper))

    @app.get("/healthz")
    async def healthz() -> Response:
        """The process answers."""
        return reply({"status": "ok"})

    @app.get("/readyz", responses={503: failures[503]})
    async def readyz() -> Response:
        """Whether recommendations can be served: a champion is loaded and the log takes decisions. Without the online store answers are degraded, but given."""
        state = await desk.readiness()
        if state["champion"] != "ok" or state["log"] != "ok":
            return problem(503, "; ".join(f"{name}: {said}" for name, said in state.items() if said not in ("ok", "no")), state)
        version = desk.service.model.version if desk.service and desk.service.model else None
        status = "paused" if state["paused"] != "no" else "ready" if state["store"] == "ok" else "degraded"
        return reply({"status": status, **state, "model_version": version})

    backlog = Gauge("fastq_decision_log_backlog", "Writes that wait for the next commit", registry=desk.metrics.registry)
    backlog.set_function(lambda: desk.service.log.backlog if desk.service else 0)
    paused = Gauge("fastq_paused", "1 while fastq is paused", registry=desk.metrics.registry)
    paused.set_function(lambda: float(desk.service is not None and desk.service.pause is not None))
    lag = Gauge("fastq_decision_log_lag_seconds", "How long the commit under way has taken so far", registry=desk.metrics.registry)
    lag.set_function(lambda: desk.service.log.lag_seconds if desk.service else 0)
    if proxy := os.environ.get("RAY_SERVE_HAPROXY_SOCKET_PATH"):
        desk.metrics.registry.register(ProxyRefusals(Path(proxy)))

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text format."""
        desk.metrics.settle(platform)
        return Response(await asyncio.to_thread(generate_latest, desk.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


def document(app: FastAPI) -> dict[str, Any]:
    """OpenAPI of the app, with the keys it wants and the problems it answers with."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            routes=app.routes,
            description="Recommendations with their propensity, explained. Errors are RFC 9457 problem details.",
        )
        parts = schema.setdefault("components", {})
        asked = RecommendationRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        parts.setdefault("schemas", {}).update({"Problem": Problem.model_json_schema(), **asked.pop("$defs", {}), "RecommendationRequest": asked})
        hot = schema["paths"]["/v1/recommendations"]["post"]  # reads its own body, so FastAPI does not know of it
        hot["requestBody"] = {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RecommendationRequest"}}}}
        again = {"type": "string", "minLength": 1, "maxLength": MOST_KEY, "description": "the same key gives the same decisions again"}
        hot["parameters"] = [{"name": "Idempotency-Key", "in": "header", "required": False, "schema": again}]
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in schema["paths"].items():
            if path not in OPEN:
                for operation in methods.values():
                    operation["security"] = [{"key": []}]
        app.openapi_schema = schema
    return app.openapi_schema


def player_card(service: Service, player_id: str) -> dict[str, Any]:
    """What is known of a player now: attributes, history by period, the last decisions. Raises `UnknownPlayerError`."""
    platform, model, at = service.platform, service.current(), datetime.now(UTC)
    reading = online.read_states(service, model, [player_id], at)
    online.must_know(reading, player_id)
    states, length = reading.states, microseconds(platform)
    newest = epoch_microseconds(at) // length - 1
    history = [
        {
            "period": online.rfc3339((newest - platform.state.window + 1 + i) * length),
            **{name: _number(value) for name, value in zip(platform.state.measures, row, strict=True)},
        }
        for i, row in enumerate(states.history[0].tolist())
    ]
    recent = service.log.recent([player_id], epoch_microseconds(at) - platform.state.window * length)
    attributes = {name: _number(v[0]) if isinstance(v, np.ndarray) else v[0] for name, v in cast("Columns", states.attributes).items()}
    seen = reading.seen_at[0]
    return {
        "player_id": player_id,
        "seen_at": online.rfc3339(seen) if seen != NEVER else None,
        "degraded": reading.degraded[0],
        "attributes": attributes,
        "history": history,
        "policy": states.policies[0] if states.policies else None,
        "decisions": [past.decision_id for past in recent[-20:]],
    }


def _number(value: float) -> float | None:
    return None if value != value else float(value)  # noqa: PLR0124 - NaN alone differs from itself


def decision_card(service: Service, decision_id: str) -> dict[str, Any]:
    """A served decision as it was answered, what it was drawn from, and what is known of its outcome. Raises `UnknownPlayerError`."""
    found = service.log.find(decision_id)
    if found is None:
        raise UnknownPlayerError(f"{decision_id}: no decision was served under this id")
    known = service.log.known([decision_id])[decision_id]
    more = {name: found.detail.get(name) for name in ("mean", "seed", "explore", "exploration", "limits", "eligible", "shadow", "batch")}
    return {**online.answer(service.platform, found), **more, "assignment": found.assignment, "outcomes": known.values, "executed": known.executed}
