"""The same answers where actions are items of a catalogue: eligibility, ranking, probabilities, defaults."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
import yaml

from fastq import features, learner, records, registry, windows
from fastq.errors import RequestError, UnknownPlayerError
from fastq.platform import Cap, Platform, load_platform
from feature_repo import store
from serving import online
from serving.online import Ask, InlineState, Question, Service

ITEMS = [f"a{k}" for k in range(8)]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """Players of two kinds who like cheap or dear items; two policies; trained for one epoch."""
    root = tmp_path_factory.mktemp("catalogue")
    (root / "logs").mkdir()
    rng, n = np.random.default_rng(0), 400
    players = pl.DataFrame({"player_id": [f"p{i}" for i in range(n)], "kind": rng.choice(["saver", "spender"], n)})
    price = np.linspace(1, 8, 8)
    item = rng.integers(0, 8, n)
    likes = np.where(players["kind"].to_numpy() == "saver", price[item] < 4, price[item] > 5)
    day = datetime.now(UTC) - timedelta(days=2)
    decisions = players.select("player_id").with_columns(
        decision_id=pl.col("player_id") + "-d",
        decided_at=pl.lit(day),
        policy=pl.Series(rng.choice(["random", "other"], n)),
        propensity=pl.lit(0.125),
        item_id=pl.Series([ITEMS[i] for i in item]),
        click=pl.Series((rng.random(n) < 0.2 + 0.6 * likes).astype(float)),
    )
    players.write_csv(root / "logs/players.csv")
    decisions.write_parquet(root / "logs/decisions.parquet")
    pl.DataFrame({"item_id": ITEMS, "price": price}).write_csv(root / "logs/items.csv")
    tree = {
        "platform": "bazaar",
        "logs": {"decisions": "logs/decisions.parquet", "players": "logs/players.csv", "items": "logs/items.csv"},
        "state": {"window": 2, "attributes": {"kind": {"kind": "categorical"}}},
        "policies": ["random", "other"],
        "action": {"kind": "catalogue", "features": {"price": {"kind": "numeric"}}, "default": "a3"},
        "objectives": {"click": {"discount": 0}},
        "training": {"epochs": 1},
    }
    (root / "fastq.yaml").write_text(yaml.safe_dump(tree))
    platform = load_platform(root)
    read = records.read_records(platform)
    policy = learner.train(platform, windows.build(platform, read, features.build_rows(platform, read)))
    policy.save(root / "bundle")
    with registry.start_run(platform, "test", {}) as run:
        version = registry.register(platform, run.id, root / "bundle")
    registry.promote(platform, version, reason="test", forced=True)
    store.materialize(platform, features.online_frame(platform, read, datetime.now(UTC)))
    return platform


@pytest.fixture
def service(platform: Platform):
    with online.open_service(platform) as opened:
        yield opened


def answers(service: Service, ask: Ask) -> list[dict]:
    found = online.decide(service, [ask])[0]
    if isinstance(found, Exception):
        raise found
    service.log.append(found).result(10)
    return [online.answer(service.platform, d) for d in found]


def test_items_are_recommended_with_their_probability_and_ranked(service: Service) -> None:
    plain = answers(service, Ask(players=("p1",)))[0]
    assert plain["action"]["item_id"] in ITEMS
    assert 0 < plain["propensity"] <= 1
    assert plain["units"] == {}
    assert "ranking" not in plain
    ranked = answers(service, Ask(players=("p1",), top_k=3))[0]
    assert len(set(ranked["ranking"])) == 3
    assert ranked["ranking"][0] == ranked["action"]["item_id"]
    sure = answers(service, Ask(players=("p1",), explore=False))[0]
    assert sure["propensity"] is None


def test_only_eligible_items_come_and_their_probabilities_add_up(service: Service) -> None:
    few = ("a1", "a6")
    seen = {a["action"]["item_id"]: a["propensity"] for a in answers(service, Ask(players=("p1",) * 200, eligible=few))}
    assert set(seen) <= set(few)
    assert sum(seen.values()) == pytest.approx(1.0) or len(seen) == 1
    for ask, says in [
        (Ask(players=("p1",), eligible=("nothing",)), "eligible"),
        (Ask(players=("p1",), top_k=9), "top_k"),
        (Ask(players=("p1",), limits={"price": {"high": 2.0}}), "limits"),
    ]:
        with pytest.raises(RequestError, match=says):
            answers(service, ask)


def test_a_proposal_that_is_not_eligible_is_refused(service: Service) -> None:
    assert answers(service, Ask(players=("p1",), eligible=("a1", "a2"), proposals={"random": {"item_id": "a2"}}))
    with pytest.raises(RequestError, match=r"proposals\.random: 'a4' is not among the request's eligible items"):
        answers(service, Ask(players=("p1",), eligible=("a1", "a2"), proposals={"random": {"item_id": "a4"}}))


def test_the_default_item_where_it_is_eligible_else_an_empty_state_is_scored(service: Service) -> None:
    default = answers(service, Ask(players=("nobody-yet",), top_k=3))[0]
    assert (default["action"], default["value"], default["propensity"]) == ({"item_id": "a3"}, None, None)
    assert default["ranking"][0] == "a3"
    assert len(set(default["ranking"])) == 3
    other = answers(service, Ask(players=("nobody-yet",), eligible=("a1",)))[0]
    assert other["action"] == {"item_id": "a1"}
    assert other["value"] is not None
    assert "empty state" in other["degraded"]


def test_inline_states_name_past_items(service: Service) -> None:
    state = InlineState("x", [[], []], {"kind": "saver"}, actions=[None, "a2"])
    assert answers(service, Ask(states=(state,)))[0]["value"] is not None
    with pytest.raises(RequestError, match="catalogue"):
        answers(service, Ask(states=(InlineState("x", [[], []], {"kind": "saver"}, actions=[None, "nothing"]),)))


def test_served_items_are_explained_and_become_lagged_features(service: Service) -> None:
    first = answers(service, Ask(players=("p7",)))[0]
    for against in ("random", "logged", {"item_id": "a0"}, f"model:{first['model_version']}"):
        why = online.explain_question(service, Question(decision_id=first["decision_id"], against=against))
        assert why["action"] == first["action"]
        assert why["value"] == pytest.approx(first["value"], rel=1e-6)
        assert why["contrast"]["against"] == against
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    states = online.read_states(service, service.current(), ["p7"], tomorrow).states
    catalogue = service.current().policy.catalogue
    expected = catalogue.embedding[catalogue.ids.index(first["action"]["item_id"])]
    np.testing.assert_allclose(states.actions[0, -1], expected, rtol=1e-6)
    with pytest.raises(RequestError, match="item_id"):
        online.explain_question(service, Question(decision_id=first["decision_id"], against={"item_id": "nothing"}))
    with pytest.raises(UnknownPlayerError):
        online.explain_question(service, Question(player_id="nobody-yet"))


def test_an_item_that_was_shown_often_enough_is_not_eligible_any_more(service: Service) -> None:
    serving = service.platform.serving.model_copy(update={"item_frequency": Cap(most=1)})
    service.platform = service.platform.model_copy(update={"serving": serving})
    seen = [answers(service, Ask(players=("p9",)))[0] for _ in range(len(ITEMS))]
    assert sorted(a["action"]["item_id"] for a in seen) == sorted(ITEMS), "an item came twice before all had come"
    assert all(a["propensity"] > 0 for a in seen)
    assert seen[-1]["propensity"] == pytest.approx(1.0)  # one is left
    assert "frequency cap" in seen[1]["degraded"]
    assert answers(service, Ask(players=("p9",)))[0]["propensity"] is None
