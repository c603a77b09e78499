"""The analyst console: pages for people who do not program, made here and complete without a script; every view has an address of its own.

Players, decisions and alternatives are named in the query of an address, where any id may stand. What changes something is a POST with the
session's token. Pages allow nothing from elsewhere and no script but ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from importlib import resources
from typing import Any, cast

import jinja2
from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from markupsafe import Markup
from starlette.responses import HTMLResponse, RedirectResponse, Response

from fastq import charts, explanation
from fastq.errors import FastqError, GateRefused, RequestError, UnknownPlayerError
from fastq.platform import Platform
from serving import views
from serving.auth import COOKIE, SESSION_SECONDS, Caller, NotAllowed, NotSignedIn
from serving.desk import Desk
from serving.online import Question
from serving.refusals import status_of

FORM_COOKIE = "fastq_form"  # ties the form for signing in to the browser it was shown in
ASSETS = {"console.css": "text/css; charset=utf-8", "console.js": "text/javascript; charset=utf-8", "icon.svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
MOST_FORM = 64 * 1024  # bytes


# ---- what a page is made with --------------------------------------------------------------------------------------------
def _number(value: float | None) -> str:
    return "unknown" if value is None else charts.number(float(value))


def _moment(value: datetime | str | int | None) -> str:
    """A moment in UTC as people write it; microseconds since 1970, RFC 3339 or a datetime. Text that is no moment is shown as it is."""
    if value is None:
        return "never"
    try:
        at = datetime.fromisoformat(value) if isinstance(value, str) else datetime.fromtimestamp(value / 1e6, UTC) if isinstance(value, int) else value
    except ValueError:
        return str(value)
    return f"{at.astimezone(UTC):%-d %b %Y, %H:%M} UTC"


def _share(value: float) -> str:
    return f"{100 * value:.3g} %" if 0 < value < 0.1 else f"{100 * value:.0f} %"


@dataclass(frozen=True)
class Paper:
    """Templates and the files beside them, read once."""

    templates: jinja2.Environment
    assets: Mapping[str, bytes]

    def page(self, name: str, status: int = 200, headers: Mapping[str, str] | None = None, **values: object) -> HTMLResponse:
        return HTMLResponse(self.templates.get_template(name).render(**values), status, dict(headers or {}))


def paper(platform: Platform) -> Paper:
    """The console's templates, in which everything that is not ours is escaped, for one platform."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("serving", "console"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    assets = {name: resources.files("serving").joinpath("console", name).read_bytes() for name in ASSETS}
    version = {name: hashlib.sha256(content).hexdigest()[:12] for name, content in assets.items()}
    templates.filters.update(number=_number, moment=_moment, day=views.day, words=views.words, share=_share, listed=explanation.joined)
    templates.globals.update(
        platform=platform.platform,
        address=views.address,
        asset=lambda name: f"/console/assets/{name}?{version[name]}",
        svg=Markup,  # only for what fastq.charts serialised
        signed_in=None,
    )
    return Paper(templates, assets)


# ---- who may -------------------------------------------------------------------------------------------------------------
def is_page(path: str) -> bool:
    """Whether a path is the console's."""
    return path == "/console" or path.startswith("/console/")


def needs_no_key(path: str, method: str) -> bool:
    """What is open to everybody: signing in, which brings its key in the form, and the style of that page."""
    return (path == "/console" and method == "POST") or (path.startswith("/console/assets/") and method == "GET")


def headers_of(path: str) -> dict[bytes, bytes]:
    """Headers of the console's answers that differ from the endpoint's."""
    found = {b"content-security-policy": POLICY.encode()}
    if path.startswith("/console/assets/"):
        found[b"cache-control"] = b"public, max-age=31536000, immutable"  # the address changes with the content
    return found


def is_browser(headers: Mapping[str, str]) -> bool:
    """Whether somebody looks at a page, rather than a program at an answer."""
    return "authorization" not in headers and "text/html" in headers.get("accept", "")


def token_of(session: str) -> str:
    """What a form must bring to show that a page of this session made it; nothing of the session can be read from it."""
    return hmac.new(session.encode(), b"fastq console form", hashlib.sha256).hexdigest()


def _equal(brought: str, expected: str) -> bool:
    """Whether a token is the expected one, in a time that does not tell how much of it is."""
    return hmac.compare_digest(brought.encode("utf-8", "replace"), expected.encode())


def _foreign(request: Request) -> bool:
    """Whether a browser says that another site sent this."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
    return site not in {"same-origin", "none"} or (
        origin is not None and origin != "null" and urllib.parse.urlsplit(origin).netloc != request.headers.get("host")
    )


async def _form(request: Request) -> dict[str, str]:
    """A form's fields. Raises `RequestError` for one that is too large."""
    body = await request.body()
    if len(body) > MOST_FORM:
        raise RequestError(f"the form is larger than {MOST_FORM} bytes")
    return {name: values[-1] for name, values in urllib.parse.parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True).items()}


async def _trusted_form(request: Request) -> dict[str, str]:
    """A form of a page that this session was shown. Raises `NotAllowed` for any other: another site may have sent it in somebody's name."""
    form = await _form(request)
    if "authorization" in request.headers:  # no browser sends a key by itself
        return form
    brought = form.pop("csrf", "") or request.headers.get("x-csrf-token", "")
    if _foreign(request) or not _equal(brought, token_of(request.cookies.get(COOKIE, ""))):
        raise NotAllowed("this form is not from a page of your session, so nothing was changed; open the page again")
    return form


class Page(APIRoute):
    """A route whose errors are pages too, for those who look at pages."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]  # FastAPI says Coroutine and awaits
        handler = super().get_route_handler()

        async def shown(request: Request) -> Response:
            try:
                return await handler(request)
            except FastqError as error:
                if not is_browser(request.headers) and "x-csrf-token" not in request.headers:
                    raise
                status = status_of(error)
                return refusal(request, status, str(error))

        return shown


def refusal(request: Request, status: int, detail: str) -> Response:
    """An error as a page, or as the piece of a page that a script asked for."""
    made = cast("Paper", request.app.state.paper)
    name = "_notice.html" if "x-csrf-token" in request.headers else "refusal.html"
    title = {403: "Not allowed", 404: "Nothing here", 409: "Not possible now", 422: "That cannot be answered", 503: "Not now"}.get(
        status, HTTPStatus(status).phrase
    )
    return made.page(name, status, None, title=title, detail=f"{detail.removesuffix('.')}.", **_frame(request))


def sign_in(made: Paper, path: str, message: str = "", status: int = 200) -> HTMLResponse:
    """The form for a key, which leads back to where somebody wanted to go."""
    seed = secrets.token_hex(16)
    answer = made.page("sign_in.html", status, message=message, wanted=path if is_page(path.split("?", maxsplit=1)[0]) else "/console", csrf=token_of(seed))
    answer.set_cookie(FORM_COOKIE, seed, max_age=3600, httponly=True, samesite="strict", path="/console")
    return answer


def _caller(request: Request) -> Caller:
    return cast("Caller", request.scope["state"]["caller"])


def _frame(request: Request) -> dict[str, Any]:
    """What stands on every page."""
    caller: Caller | None = request.scope.get("state", {}).get("caller")
    return {"signed_in": caller, "here": request.url.path, "csrf": token_of(request.cookies.get(COOKIE, "")), "asked": request.query_params.get("q", "")}


# ---- the routes ----------------------------------------------------------------------------------------------------------
def router(desk: Desk, made: Paper) -> APIRouter:
    """The console of one desk."""
    platform = desk.platform
    players, sample = views.Players(platform), views.Overlap(platform)
    routes = APIRouter(route_class=Page, include_in_schema=False)

    def page(request: Request, name: str, status: int = 200, **values: object) -> HTMLResponse:
        return made.page(name, status, None, **_frame(request), **values)

    @routes.get("/console/assets/{name}")
    async def assets(name: str) -> Response:
        if name not in ASSETS:
            raise UnknownPlayerError("there is nothing under this path")
        return Response(made.assets[name], media_type=ASSETS[name])

    @routes.get("/console")
    async def find(request: Request) -> Response:
        """Find a player; what the platform serves now."""
        return page(request, "find.html", **await asyncio.to_thread(views.players_page, desk.open(), players, dict(request.query_params)))

    @routes.post("/console")
    async def signing_in(request: Request) -> Response:
        form = await _form(request)
        wanted = form.get("wanted", "/console")
        wanted = wanted if is_page(wanted.split("?")[0]) and "//" not in wanted.split("?")[0] and "\\" not in wanted else "/console"
        seen = {"origin", "sec-fetch-site"} & set(request.headers)  # a browser; a program has nobody in whose name it could be misused
        if seen and (_foreign(request) or not _equal(form.get("csrf", ""), token_of(request.cookies.get(FORM_COOKIE, "")))):
            return sign_in(made, wanted, "This form was not made here, or it is an hour old. Please try again.", 403)
        try:
            token, caller = await asyncio.to_thread(desk.keys.sign_in, form.get("key", ""))
            caller.require("analyst")
        except NotSignedIn:
            return sign_in(made, wanted, "This key is not known here, or it was revoked.", 401)
        except NotAllowed as error:
            return sign_in(made, wanted, f"{error}.", 403)
        answer = RedirectResponse(wanted, 303)
        answer.set_cookie(COOKIE, token, max_age=SESSION_SECONDS, httponly=True, samesite="strict", secure=request.url.scheme == "https", path="/")
        answer.delete_cookie(FORM_COOKIE, path="/console", httponly=True, samesite="strict")
        return answer

    @routes.post("/console/sign-out")
    async def sign_out(request: Request) -> Response:
        await _trusted_form(request)
        if (token := request.cookies.get(COOKIE)) is not None:
            await asyncio.to_thread(desk.keys.sign_out, token)
        answer = RedirectResponse("/console", 303)
        answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return answer

    explaining = asyncio.Semaphore(2)  # as the endpoint's: pages must not starve recommendations

    async def explained(request: Request, question: Question) -> Response:
        async with explaining:
            with desk.metrics.stage.labels("explain").time():
                return page(request, "player.html", **await asyncio.to_thread(views.subject_page, desk.open(), question))

    @routes.get("/console/player")
    async def player(request: Request) -> Response:
        """A player now: what would be recommended, and why."""
        question = views.asked_of(platform, request.query_params, "player_id")
        return await explained(request, question)

    @routes.get("/console/decision")
    async def decision(request: Request) -> Response:
        """A past decision, as it was decided then."""
        question = views.asked_of(platform, request.query_params, "decision_id")
        return await explained(request, question)

    @routes.get("/console/what-if")
    async def what_if(request: Request) -> Response:
        """Other weights and another action on sliders; a form that anybody may send a colleague as an address."""
        return page(request, "what_if.html", **await asyncio.to_thread(views.what_if_page, desk.open(), dict(request.query_params)))

    @routes.post("/console/what-if")
    async def dragged(request: Request) -> Response:
        """Only the answer, for the script that asks while a slider is dragged."""
        form = await _trusted_form(request)
        return page(request, "_what_if.html", **await asyncio.to_thread(views.what_if_page, desk.open(), form))

    @routes.get("/console/policies")
    async def policies(request: Request) -> Response:
        """Where the policies overlap, and what each is estimated to bring."""
        return page(request, "policies.html", **await asyncio.to_thread(views.policies_page, desk.open(), sample, request.query_params.get("objective")))

    @routes.get("/console/models")
    async def models(request: Request) -> Response:
        """The versions, what the gate said of them, and who promoted what and why."""
        return page(request, "models.html", done=request.query_params.get("done"), **await asyncio.to_thread(views.models_page, desk))

    @routes.post("/console/models")
    async def promote(request: Request) -> Response:
        """Promotion and rollback: admins alone, with a reason that is kept in the audit log."""
        form, caller = await _trusted_form(request), _caller(request)
        caller.require("admin")
        try:
            done = await asyncio.to_thread(views.change_champion, platform, form, f"key {caller.key_id}")
        except (GateRefused, RequestError) as error:
            reasons = error.reasons if isinstance(error, GateRefused) else [str(error)]
            return page(request, "models.html", 409, done=None, refused=reasons, **await asyncio.to_thread(views.models_page, desk))
        return RedirectResponse(views.address("models", done=done), 303)

    @routes.get("/console/health")
    async def health(request: Request) -> Response:
        """Latency, degraded answers, the decision log's lag, the last retraining."""
        state = await desk.readiness()
        return page(request, "health.html", **await asyncio.to_thread(views.health_page, desk, state))

    @routes.get("/console/{anything:path}")
    async def nothing(request: Request, anything: str) -> Response:
        return refusal(request, 404, "There is nothing under this address; the links above lead to what there is.")

    return routes
