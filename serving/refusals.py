"""What the endpoint answers where it does not answer: each error's status, and RFC 9457 problem details in which nothing of the internals is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fastq.errors import FastqError, RequestError, UnknownPlayerError
from serving.auth import NotAllowed, NotSignedIn
from serving.decision_log import KeyReused, LogUnavailable, OutcomeConflict, UnknownDecisions
from serving.online import NotReady, StoreUnavailable

logger = logging.getLogger("fastq.serving")


class Overloaded(FastqError):
    """More requests wait than can be answered soon; this one was not begun."""


class TooOften(FastqError):
    """A key that asks more often than `serving.rate_limit` allows."""


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
