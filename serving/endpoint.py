"""The endpoint: contract section 5 as a FastAPI app that answers in its own process, and needs no Ray to be tried.

Routes, what each may be asked by whom, and the gate before them; what waits and follows is at the desk (`serving.desk`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
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

from fastq.errors import FastqError, RequestError, UnknownPlayerError
from fastq.features import NEVER, Columns, epoch_microseconds, microseconds
from fastq.platform import Platform
from fastq.workspace import Workspace
from serving import online, pages
from serving.auth import COOKIE, Caller, Keys, NotSignedIn, Tokens
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
from serving.decision_log import Request as Repeatable
from serving.desk import Desk, Turns, opened
from serving.metrics import ProxyRefusals, new_metrics
from serving.online import NotReady, Service, StoreUnavailable
from serving.refusals import problem, refusal

if TYPE_CHECKING:
    from fastapi.types import DecoratedCallable

Body = TypeVar("Body", bound=BaseModel)
MOST_BYTES = 16 * 2**20  # of a request's body
MOST_KEY = 300  # characters of an Idempotency-Key
QUERY_SECONDS = 20  # that an analyst's SQL may run

OPEN = frozenset({"/healthz", "/readyz", "/metrics", "/openapi.json"})
RECOMMEND = frozenset({"/v1/recommendations", "/v1/outcomes", "/v1/activity"})  # every other route needs an analyst
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"),
]


# ---- bodies -----------------------------------------------------------------------------------------------------------------
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
