"""Bad news by webhook: one JSON document per refusal, failure or finding. It never fails what it tells of."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from fastq.platform import Platform

logger = logging.getLogger("fastq.schedule")
VARIABLE = "FASTQ_WEBHOOK"  # wins over `operations.webhook`: a webhook's address is often a secret
SECONDS, TRIES = 5.0, 3

Event = Literal["refusal", "failure", "drift", "rollback"]


def notify(platform: Platform, event: Event, says: str, detail: Mapping[str, Any] | None = None) -> bool:
    """Post `{platform, event, says, text, at, detail}` to the platform's webhook; whether somebody took it. `text` is what chat services show."""
    import httpx

    url = os.environ.get(VARIABLE) or platform.operations.webhook
    if not url:
        return False
    at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    body = {"platform": platform.platform, "event": event, "says": says, "text": f"{platform.platform}: {says}", "at": at}
    kept = {name: (detail or {}).get(name) for name in ("version", "reasons", "findings", "error") if name in (detail or {})}
    for _ in range(TRIES):
        try:
            answer = httpx.post(url, json={**body, "detail": kept}, timeout=SECONDS)
            if answer.is_success:
                return True
            logger.warning("the webhook did not take a %s: HTTP %s", event, answer.status_code)
        except (httpx.HTTPError, httpx.InvalidURL, TypeError, ValueError) as error:
            logger.warning("the webhook did not take a %s: %s", event, type(error).__name__)  # its address is not for logs
    return False
