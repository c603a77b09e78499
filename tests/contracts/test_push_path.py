"""New events reach the next recommendation, each once, on the embedded SQLite, a real Redis and a real PostgreSQL, whatever is materialised meanwhile."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastq import records
from fastq.platform import Platform, load_platform
from fastq.workspace import Workspace
from feature_repo import store
from pipelines import materialize
from serving import online
from serving.decision_log import Event, now_us
from serving.online import Ask, Service


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def platform(request: pytest.FixtureRequest, trained: Path, tmp_path: Path) -> Platform:
    """A workspace of its own with the trained champion, whose states are in the online store of the parameter's kind."""
    root = shutil.copytree(trained, tmp_path / "workspace")
    if request.param != "sqlite":
        file, url = root / "fastq.yaml", request.getfixturevalue(f"{request.param}_server").url
        file.write_text(f"{file.read_text()}\nservices: {{online_store: '{url}'}}\n")
        (root / ".fastq" / "feast" / "online.db").unlink()
    return load_platform(root)


@pytest.fixture
def service(platform: Platform) -> Iterator[Service]:
    with online.open_service(platform) as opened:
        yield opened


def ingest(platform: Platform) -> None:
    records.write_tables(records.read_records(platform), Workspace(platform.root))


def build(platform: Platform) -> None:
    materialize.build_features.fn(str(platform.root), "turn")


def seen(service: Service, player: str, measure: str) -> float:
    """The sum of a measure over what the next decision sees of a player."""
    states = online.read_states(service, service.current(), [player], datetime.now(UTC)).states
    return float(np.nansum(states.history[0, :, list(service.platform.state.measures).index(measure)]))


def a_sum(platform: Platform) -> str:
    return next(name for name, measure in platform.state.measures.items() if measure.aggregate == "sum")


def test_a_new_event_changes_the_next_recommendation_within_a_second(service: Service) -> None:
    platform = service.platform
    build(platform)
    player, measure = store.materialized(platform)["player_id"][0], a_sum(platform)
    before = online.decide(service, [Ask(players=(player,), explore=False)])[0][0]
    started = time.monotonic()
    service.log.record_activity([Event(player, now_us() - 1_000_000, {measure: 9.0})]).result(10)
    assert online.apply_activity(service) == 1
    after = online.decide(service, [Ask(players=(player,), explore=False)])[0][0]
    assert time.monotonic() - started < 1.0
    assert after.detail["value"] != before.detail["value"]


def test_each_event_counts_once_whenever_it_comes(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the logs are read, while the tables wait, while states are written and after; pushed at once or late."""
    platform, measure = service.platform, a_sum(service.platform)
    worth = {
        "applied before the logs are read": 1.0,
        "pushed late": 2.0,
        "between": 4.0,
        "between, pushed late": 8.0,
        "while states are written": 16.0,
        "after": 32.0,
    }
    players = ["newcomer", store.materialized(platform)["player_id"][3]]
    build(platform)
    at_first = [seen(service, player, measure) for player in players]

    def happens(what: str, *, push: bool) -> None:
        service.log.record_activity([Event(player, now_us() - 1_000_000, {measure: worth[what]}) for player in players]).result(10)
        if push:
            online.apply_activity(service)

    happens("applied before the logs are read", push=True)
    happens("pushed late", push=False)
    ingest(platform)
    happens("between", push=True)
    happens("between, pushed late", push=False)
    writes = store.materialize

    def writing(platform: Platform, frame: pl.DataFrame, served: pl.Series) -> int:
        happens("while states are written", push=True)  # onto the states that are replaced next
        written = writes(platform, frame, served)
        assert [seen(service, player, measure) - first for player, first in zip(players, at_first, strict=True)] == [3.0, 3.0]
        return written

    monkeypatch.setattr(store, "materialize", writing)
    build(platform)
    happens("after", push=True)
    assert online.apply_activity(service) == 0
    for player, first in zip(players, at_first, strict=True):
        assert seen(service, player, measure) - first == sum(worth.values()), player
    monkeypatch.setattr(store, "materialize", writes)
    ingest(platform)
    build(platform)
    for player, first in zip(players, at_first, strict=True):
        assert seen(service, player, measure) - first == sum(worth.values()), f"{player}, out of the logs"


def test_what_is_pushed_again_after_a_crash_counts_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the push and the note of it: the next start pushes the same events."""
    platform, measure = service.platform, a_sum(service.platform)
    build(platform)
    player = store.materialized(platform)["player_id"][5]
    first = seen(service, player, measure)
    service.log.record_activity([Event(player, now_us() - 1_000_000, {measure: 3.0})]).result(10)
    with monkeypatch.context() as patched:
        patched.setattr(service.log, "applied", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            online.apply_activity(service)
    assert seen(service, player, measure) - first == 3.0
    assert online.apply_activity(service) == 1
    assert seen(service, player, measure) - first == 3.0
