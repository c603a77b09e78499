"""Drift, promises, lift: found where they were planted, quiet where nothing was, with bounds that hold however often one looks."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from fastq import monitoring, records, worlds
from fastq.errors import ConfigurationError
from fastq.monitoring import DAY, Mean, anytime_radius, difference, lift_rows, mean_by_player
from fastq.platform import load_platform, platform_from_tree
from serving.decision_log import Event, open_log

DAYS, WARM_UP, QUIET = 38, 10, 8


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    """A simulated platform: what a retraining saw, and eight more days."""
    root = tmp_path_factory.mktemp("arena")
    worlds.write_logs(worlds.world("arena"), root, players=1_000, days=DAYS, seed=3)
    platform = load_platform(root)
    read = records.read_records(platform)
    start = read.decisions["decided_at"].min() + WARM_UP * DAY
    kept = {"decisions": read.decisions.filter(pl.col("decided_at") >= start), "activity": read.activity.filter(pl.col("occurred_at") >= start).collect()}
    read = replace(read, **kept)
    return platform, read, monitoring.reached(read).full - QUIET * DAY


def before(read, moment):
    return replace(read, decisions=read.decisions.filter(pl.col("decided_at") < moment), activity=read.activity.filter(pl.col("occurred_at") < moment))


def looked(arena, read, moment):
    platform, whole, cut = arena
    now = before(read, moment)
    return {found.key: found for found in monitoring.look(platform, now, *monitoring.reference_of(platform, before(whole, cut), monitoring.reached(now)), cut)}


def test_quiet_days_find_nothing(arena):
    for hours in (3, 15, 24, 31, 77, 120, 165):
        assert looked(arena, arena[1], arena[2] + timedelta(hours=hours)) == {}


def test_what_is_served_before_the_days_logs_have_come_is_no_loss_of_volume(arena):
    platform, whole, cut = arena
    read = replace(whole, activity=None)  # activity, where there is any, says how far the logs have come too
    logged = replace(read, decisions=read.decisions.filter(pl.col("decided_at") < cut + DAY))
    served = logged.decisions.tail(1).with_columns(policy=pl.lit("fastq"), decided_at=pl.lit(cut + DAY + timedelta(hours=15)).cast(pl.Datetime("us", "UTC")))
    now = replace(logged, decisions=pl.concat([logged.decisions, served]))
    reference = replace(read, decisions=read.decisions.filter(pl.col("decided_at") < cut))
    assert monitoring.look(platform, now, *monitoring.reference_of(platform, reference, monitoring.reached(now)), cut) == []


def test_events_over_http_before_the_days_exports_are_no_loss_of_players(arena, tmp_path):
    """Every tenth player's events come at once, the rest by the day. Exports that stop are missed all the same, until it is clear that they have ended."""
    platform, whole, cut = arena
    here = load_platform((tmp_path / "fastq.yaml").write_text((platform.root / "fastq.yaml").read_text()) and tmp_path)
    ended, now = cut + DAY, cut + 2 * DAY + timedelta(hours=1)
    live = whole.activity.filter((pl.col("occurred_at") >= cut) & (pl.col("occurred_at") < now) & (pl.col("player_id").hash(0) % 10 == 0))
    log = open_log(here)
    log.record_activity([Event(p, int(at.timestamp() * 1e6), {}) for p, at in live.select("player_id", "occurred_at").iter_rows()]).result(60)
    log.close()
    exported = whole.activity.filter(pl.col("occurred_at") < ended)
    read = replace(whole, activity=pl.concat([exported, live]).unique(["player_id", "occurred_at"]), decisions=before(whole, now).decisions)

    def looked_at(read):
        reference = monitoring.reference_of(here, before(whole, cut), monitoring.reached(read))
        return [found.key for found in monitoring.look(here, read, *reference, cut)]

    assert "active players a day" in looked_at(read)
    cut_off = monitoring.as_exported(here, read)
    assert monitoring.reached(cut_off).activity == monitoring.reached(replace(read, activity=exported)).activity
    assert looked_at(cut_off) == []
    later = replace(read, activity=read.activity.filter((pl.col("occurred_at") >= now - timedelta(hours=1)) | (pl.col("occurred_at") < now - 8 * DAY)))
    assert monitoring.as_exported(here, later).activity.height == later.activity.height, "exports that ended a week ago"
    assert monitoring.as_exported(platform, read).activity.height == read.activity.height, "nothing came over HTTP"


def late(read, changes, since):
    """`read` with expressions for columns of decisions or activity from `since` on."""
    frames = {}
    for table, time, columns in (("decisions", "decided_at", changes.get("decisions", {})), ("activity", "occurred_at", changes.get("activity", {}))):
        frames[table] = getattr(read, table).with_columns(pl.when(pl.col(time) >= since).then(new).otherwise(old).alias(old) for old, new in columns.items())
    return replace(read, **frames)


SHUFFLED = pl.col("propensity").shuffle(seed=1)
PLANTED = {
    "a unit changed": ({"activity": {"minutes": pl.col("minutes") * 60}}, "minutes"),
    "another policy acts as retain": (
        {"decisions": {"bonus": pl.when(pl.col("policy") == "retain").then(pl.col("bonus") * 2).otherwise("bonus")}},
        "retain: bonus",
    ),
    "propensities per cent": ({"decisions": {"propensity": pl.col("propensity") * 2}}, "spend: log propensity"),
    "propensities of other decisions": ({"decisions": {"propensity": SHUFFLED}}, "stretch: agreement"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_change_is_found_within_a_day(arena, planted):
    changes, key = PLANTED[planted]
    since = arena[2] + timedelta(hours=13)
    found = looked(arena, late(arena[1], changes, since), since + DAY)
    assert key in found
    assert f"{found[key].now:.4g}" in monitoring.sentence(found[key])


def test_fewer_decisions_are_found(arena):
    _platform, read, cut = arena
    fewer = read.decisions.filter((pl.col("decided_at") < cut) | (pl.col("player_id").hash(0) % 4 == 0))
    found = looked(arena, replace(read, decisions=fewer), cut + 2 * DAY + timedelta(hours=1))
    assert found["decisions a day"].z < 0


def test_a_reference_is_the_same_after_json(arena):
    platform, read, cut = arena
    made = monitoring.reference_of(platform, before(read, cut))
    assert monitoring.from_json(monitoring.as_json(*made)) == made
    assert len(made[0]) > 40


# ---- promises and guardrails ---------------------------------------------------------------------------------------------------
TREE = {
    "platform": "shop",
    "logs": {"decisions": "d.parquet"},
    "state": {"period": "1d"},
    "policies": ["a", "b"],
    "action": {"kind": "continuous", "dimensions": {"goal": {"low": 0, "high": 1}}},
    "objectives": {"joy": {}, "cost": {"weight": -1.0, "ceiling": 0.12}},
    "serving": {"holdout": {"share": 0.2, "policy": "a"}},
}


@pytest.fixture
def shop(tmp_path):
    return platform_from_tree(TREE, tmp_path, "a test")


def decided(rng, players, days, joy, cost):
    """One decision a day for each player; outcomes with the given means."""
    at = datetime(2026, 3, 1, tzinfo=UTC)
    rows = players * days
    player = np.tile(np.arange(players), days)
    own = rng.normal(0, 0.3, players)[player]
    return pl.DataFrame(
        {
            "player_id": player.astype(str),
            "decided_at": [at + timedelta(days=d, seconds=p) for d in range(days) for p in range(players)],
            "joy": joy + own + rng.normal(0, 0.5, rows),
            "cost": rng.gamma(1, 1, rows) * cost,
        }
    )


JOY, COST = (
    monitoring.Promise("joy", {"joy": 1.0}, 1.0, 0.97, None, 0.25),
    monitoring.Promise("cost", {"cost": -1.0}, -0.1, -0.11, None, 0.25),
)


def test_outcomes_worse_than_promised_are_found_and_those_as_promised_are_not():
    rng = np.random.default_rng(0)
    assert monitoring.broken_promises(decided(rng, 2_000, 1, 1.0, 0.1), [JOY, COST]) == []
    (found,) = monitoring.broken_promises(decided(rng, 2_000, 1, 0.87, 0.1), [JOY, COST])
    assert found.key == "promised joy"
    assert found.z < 0
    (found,) = monitoring.broken_promises(decided(rng, 2_000, 1, 1.0, 0.13), [JOY, COST])
    assert found.key == "promised cost"  # of what weighs against, more is worse
    assert found.z > 0
    assert (found.was, found.now) == (0.11, pytest.approx(0.13, rel=0.1))
    assert monitoring.broken_promises(decided(rng, 2_000, 1, 0.87, 0.13).head(0), [JOY, COST]) == []


def test_what_players_differ_by_does_not_hide_a_shortfall():
    """Players whose own joy is most of the noise, 5 % worse than promised: seen only beside what was expected of each. A window half of which has none
    is compared as it is, and who plays (all of them players who enjoy less) is no shortfall.
    """
    rng = np.random.default_rng(1)
    own = rng.normal(0, 1, 500)
    at = datetime(2026, 3, 1, tzinfo=UTC)

    def seen(joy, own):
        frame = {"player_id": [str(p) for p in range(len(own))], "decided_at": [at] * len(own)}
        return pl.DataFrame(frame | {"joy": joy + own + rng.normal(0, 0.1, len(own)), "expected joy": 1.0 + own})

    promise = monitoring.Promise("joy", {"joy": 1.0}, 1.0, 0.99, -0.01, 1.0)
    assert [found.window for found in monitoring.broken_promises(seen(0.95, own), [promise])] == [1]
    assert monitoring.broken_promises(seen(0.95, own).drop("expected joy"), [promise]) == []
    half = seen(0.95, own).with_columns(pl.when(pl.int_range(pl.len()) % 2 == 0).then("expected joy"))
    assert monitoring.broken_promises(half, [promise]) == []
    assert monitoring.broken_promises(seen(1.0, own[own < 0]), [promise]) == []
    assert monitoring.broken_promises(seen(1.0, own[own < 0]).drop("expected joy"), [promise]) != []


def test_all_together_is_where_a_little_less_of_each_shows_most(shop):
    """Fisher's direction by hand: means 1 and 0.1, deviations 2 and 0.1, independent: weights 1 / 4 to 0.1 / 0.01 = 10, cost against."""
    rng = np.random.default_rng(2)
    outcomes = np.stack([rng.normal(1, 2, 200_000), rng.normal(0.1, 0.1, 200_000)], 1)
    found = monitoring.combinations(shop, outcomes, outcomes - outcomes.mean(0))
    assert list(found) == ["joy", "cost", "weighted sum", monitoring.TOGETHER]
    assert found["weighted sum"] == {"joy": 1.0, "cost": -1.0}
    assert found[monitoring.TOGETHER]["cost"] == -1.0
    assert found[monitoring.TOGETHER]["joy"] == pytest.approx(0.025, rel=0.05)
    assert monitoring.shares(found) == {"joy": 1 / 6, "cost": 1 / 6, "weighted sum": 1 / 6, monitoring.TOGETHER: 0.5}


def test_an_objective_that_is_known_late_and_tells_little_is_not_waited_for(tmp_path):
    late = platform_from_tree({**TREE, "objectives": {"joy": {}, "later": {"known_after": "7d"}}}, tmp_path, "a test")
    rng = np.random.default_rng(3)
    little = np.stack([rng.normal(1, 1, 50_000), rng.normal(0.1, 1, 50_000)], 1)
    assert list(monitoring.combinations(late, little, little)[monitoring.TOGETHER]) == ["joy"]
    much = np.stack([rng.normal(0.1, 1, 50_000), rng.normal(1, 1, 50_000)], 1)
    assert list(monitoring.combinations(late, much, much)[monitoring.TOGETHER]) == ["joy", "later"]


def test_the_bound_for_hourly_looks_is_what_simulation_says():
    """The largest of 2,160 hourly means of whole windows passes z as often as `crossing` says, to a fifth: white noise by the hour."""
    rng = np.random.default_rng(4)
    hours = rng.standard_normal((4_000, 24 * (monitoring.HORIZON + 6)))
    sums = np.cumsum(hours, axis=1)
    for window, z in ((1, 3.4), (3, 3.0), (7, 2.8)):
        wide = 24 * window
        moving = (sums[:, wide : wide + 24 * monitoring.HORIZON] - sums[:, :-wide][:, : 24 * monitoring.HORIZON]) / math.sqrt(wide)
        passed = (moving.max(1) > z).mean()
        assert passed == pytest.approx(1 - math.exp(-monitoring.crossing(z, window)), rel=0.2)
        assert monitoring.largest(monitoring.crossing(4.0, window), window) == pytest.approx(3.167e-5, rel=1e-3)


# ---- the balance probe -----------------------------------------------------------------------------------------------------------
def acted(rng, leak, players=200, days=2, size=8):
    """state, who acts, player, days' masks: three policies, whose choice follows the state by `leak`."""
    state = rng.standard_normal((days * players, size)) + np.tile(rng.standard_normal((players, size)) / 2, (days, 1))
    chance = np.exp(leak * state[:, :3])
    label = (rng.random((len(state), 1)) > np.cumsum(chance / chance.sum(1, keepdims=True), 1)).sum(1)
    return state, label, np.tile(np.arange(players), days), ["a", "b", "c"], [np.repeat(np.arange(days) == day, players) for day in range(days)]


def test_a_probe_finds_what_is_left_of_who_acts_and_nothing_in_noise():
    none, some = (monitoring.probe(*acted(np.random.default_rng(1), leak)) for leak in (0.0, 2.0))
    assert none.accuracy == pytest.approx(1 / 3, abs=3 * math.sqrt(none.variance))
    assert some.accuracy > 0.6
    assert (some.players, len(some.each)) == (200, 2)
    assert some.accuracy == pytest.approx(np.mean(some.each))
    state, label, player, names, days = acted(np.random.default_rng(2), 0.0)
    assert monitoring.probe(state, np.where(player < 15, 2, label % 2), player, names, days) is None  # 15 players of the third say too little


def test_a_probes_variance_holds_what_its_training_owes_to_luck():
    """The spread of 60 probes of worlds alike is no more than they say of themselves, and not a third of it."""
    rng = np.random.default_rng(3)
    found = [monitoring.probe(*acted(rng, 1.0)) for _ in range(60)]
    spread, said = np.var([each.accuracy for each in found], ddof=1), np.mean([each.variance for each in found])
    assert said / 3 < spread < said


def test_a_guardrail_is_broken_only_beyond_doubt(shop):
    rng = np.random.default_rng(1)
    assert monitoring.broken_guardrails(shop, decided(rng, 500, 5, 1.0, 0.12)) == []
    (broken,) = monitoring.broken_guardrails(shop, decided(rng, 500, 5, 1.0, 0.16))
    assert broken["objective"] == "cost"
    assert broken["low"] > 0.12


# ---- bounds at all times ---------------------------------------------------------------------------------------------------------
def test_the_radius_by_hand():
    """n = 400 (error 0.05, scale 1), a = 0.05: r = 1000 / (2 ln 20 + ln(1 + 2 ln 20)) = 1000 / (5.9915 + 1.9447) = 126.00."""
    r = 1000 / (2 * math.log(20) + math.log(1 + 2 * math.log(20)))
    assert r == pytest.approx(126.0, abs=0.05)
    assert anytime_radius(0.05, 1.0, math.inf) == pytest.approx(0.05 * math.sqrt((400 + r) / 400 * math.log((400 + r) / (r * 0.0025))), rel=1e-9)
    assert anytime_radius(0.05, 1.0, 5) > anytime_radius(0.05, 1.0, 50) > anytime_radius(0.05, 1.0, math.inf)


def test_a_mean_by_player_is_that_of_decisions_with_the_error_of_players():
    values, player = np.array([1.0, 3.0, 5.0, 5.0]), np.array(["a", "a", "b", "b"])
    mean = mean_by_player(values, player)
    assert (mean.value, mean.players, mean.decisions) == (3.5, 2, 4)
    # residuals by player: (4 - 7)/4, (10 - 7)/4; squares sum to 1.125, times 2/1
    assert mean.error == pytest.approx(1.5)


def test_bounds_hold_at_all_of_many_looks():
    """100 worlds, each looked at after every day of 60, 5 % may fail: beyond 11 failures has probability 0.4 % if the promise is kept. A fixed-time
    interval of the same level fails in more than 20 of them.
    """
    rng = np.random.default_rng(5)
    missed, naive = 0, 0
    for _ in range(100):
        own = rng.normal(0, 0.4, 300)
        held = np.arange(300) % 3 == 0
        sums, failed, plain = np.zeros(300), False, False
        for day in range(1, 61):
            sums += own + rng.normal(1, 1, 300)
            means = []
            for side in (~held, held):
                x = sums[side] / day
                scale = math.sqrt(1 + 0.16)
                means.append(Mean(x.mean(), x.std(ddof=1) / math.sqrt(side.sum()), scale, int(side.sum()), day * int(side.sum())))
            _, low, high = difference(*means)
            failed |= not low <= 0 <= high
            plain |= abs(means[0].value - means[1].value) > 1.96 * math.hypot(means[0].error, means[1].error)
        missed += failed
        naive += plain
    assert missed <= 11
    assert naive > 15


def test_lift_has_a_row_per_objective_and_the_weighted_sum(shop):
    rng = np.random.default_rng(2)
    frame = decided(rng, 400, 10, 1.0, 0.1).with_columns(held=pl.col("player_id").cast(pl.Int64) % 5 == 0)
    better = frame.with_columns(joy=pl.col("joy") + pl.when("held").then(0.0).otherwise(0.3))
    rows, reasons = lift_rows(shop, better)
    assert [row["objective"] for row in rows] == ["joy", "cost", None]
    assert reasons == []
    joy, cost, total = rows
    assert joy["low"] < 0.3 < joy["high"]
    assert joy["low"] > 0
    assert cost["low"] < 0 < cost["high"]
    assert total["value"] == pytest.approx(joy["value"] - cost["value"])
    assert total["players"] == 400
    rows, reasons = lift_rows(shop, better.with_columns(joy=pl.when("held").then(None).otherwise("joy")))
    assert [row["objective"] for row in rows] == ["cost"]
    assert len(reasons) == 2


def test_lift_without_a_holdout_says_what_to_set(shop):
    with pytest.raises(ConfigurationError, match="holdout"):
        monitoring.lift(platform_from_tree({**TREE, "serving": {}}, shop.root, "a test"))
