"""`make bench-operations`: false alarms, power, coverage and rollback of the sequential tests, by simulation of the statistics themselves.

The histories are 2,000 players who each act once a day at an hour of their own; the tests are `monitoring.surprises`, `allowed`, `anytime_radius` as
the monitor calls them, on the sums that it would have taken: every hour of 90 days, three windows, 48 tests.
"""

import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from scipy import stats

from fastq import PlayerStates, evaluation, features, learner, load_platform, monitoring, records, windows, worlds
from fastq.monitoring import (
    HORIZON,
    LEVEL_DAYS,
    REFERENCE_DAYS,
    TOGETHER,
    WINDOWS,
    Mean,
    allowed,
    anytime_radius,
    difference,
    habits,
    largest,
    shares,
    surprises,
)

PLAYERS, TESTS = 2_000, 48
HISTORIES = int(os.environ.get("HISTORIES", "200"))
SEED = 20261126


def values(rng, kind, days):
    """[days, players] of one measure: what is usual for a player, what is usual for the season, and the day's chance."""
    own = rng.standard_normal(PLAYERS, np.float32) / 2
    season = 0.01 * np.sin(2 * np.pi * (np.arange(days) + rng.integers(7)) / 7)[:, None]  # weekends differ, a little
    x = rng.standard_normal((days, PLAYERS), np.float32) + own + season.astype(np.float32)
    if kind == "skewed":
        x = np.exp(np.float32(0.8) * x)
        return np.minimum(x, np.quantile(x[:REFERENCE_DAYS], 0.995))
    return (x > 0.4).astype(np.float32) if kind == "flag" else x


def hourly(x, hour, window, first):
    """(mean [H], variance [H]) of windows of whole days that end at each hour from day `first` on; `hour` sorted, one value a day for each player."""
    rolled = sum(x[window - 1 - i : len(x) - i] for i in range(window)) / window
    rolled = np.concatenate([np.zeros((window - 1, PLAYERS), x.dtype), rolled])
    edges = np.searchsorted(hour, np.arange(24))  # the first player of each hour of the day: with 2,000 of them each hour has some
    found = []
    for power in (rolled, rolled * rolled):
        running = np.cumsum(np.add.reduceat(power, edges, axis=1, dtype=np.float64), 1)  # [days, 24]: until each hour's end
        today, yesterday = running[first:], running[first - 1 : -1]
        found.append((today + yesterday[:, -1:] - yesterday).ravel())
    mean = found[0] / PLAYERS
    return mean, (found[1] / PLAYERS - mean**2) / (PLAYERS - 1)


def alarms(x, hour, tests=TESTS):
    """[H] whether each hour after the reference finds something in this measure."""
    reference = x[:REFERENCE_DAYS][::-1]
    days = reference.mean(1)
    daily = float(reference.var(1, ddof=1).mean() / PLAYERS)
    level = reference[:LEVEL_DAYS].mean(0)
    error = math.sqrt(level.var(ddof=1) / PLAYERS)
    variance, drift = habits(days)
    found = np.zeros((len(x) - REFERENCE_DAYS) * 24, bool)
    for window in WINDOWS:
        mean, spread = hourly(x, hour, window, REFERENCE_DAYS)
        _, p = surprises(level.mean(), error, daily, variance, drift, REFERENCE_DAYS, mean, spread, PLAYERS, window)
        found |= p < allowed(tests, window)
    return found


def broken(x, hour, share):
    """[H] whether each hour after the first week finds a promise broken of which this measure is exactly the lower end: nothing is worse than that."""
    found = np.zeros((len(x) - LEVEL_DAYS) * 24, bool)
    for window in WINDOWS:
        mean, variance = hourly(x, hour, window, LEVEL_DAYS)
        p = stats.t.cdf(mean / np.sqrt(variance), PLAYERS - 1)
        found |= p < largest(monitoring.ALPHA * monitoring.PROMISED_SHARE * share / len(WINDOWS), window)
    return found


@pytest.mark.timeout(7_200)
def test_false_alarms_of_quiet_histories():
    """At most 5 % of the histories, looked at hourly for 90 days, have one."""
    started, wrong, drifted, promised = time.monotonic(), 0, 0, 0
    for history in range(HISTORIES):
        rng = np.random.default_rng([SEED, history])
        hour = np.sort(rng.uniform(0, 24, PLAYERS))
        drift = [alarms(values(rng, ("plain", "skewed", "flag")[k % 3], REFERENCE_DAYS + HORIZON), hour).any() for k in range(TESTS)]
        kept = [broken(values(rng, "plain", LEVEL_DAYS + HORIZON), hour, share).any() for share in shares([TOGETHER, *"abcdef"]).values()]
        drifted, promised, wrong = drifted + any(drift), promised + any(kept), wrong + any(drift + kept)
    low, high = stats.binomtest(wrong, HISTORIES).proportion_ci()
    print(
        f"\nfalse alarms: {wrong} of {HISTORIES} quiet histories of {HORIZON} days x 24 looks "
        f"({drifted} by {TESTS} tests of drift, {promised} by 7 promises at their very edge) "
        f"({low:.1%} to {high:.1%}); {time.monotonic() - started:.0f} s"
    )
    assert wrong / HISTORIES <= 0.05


@pytest.mark.parametrize("shift", [0.25])
def test_two_measures_moved_by_a_quarter_of_a_standard_deviation(shift):
    found = 0
    for history in range(50):
        rng = np.random.default_rng([SEED, 1, history])
        hour = np.sort(rng.uniform(0, 24, PLAYERS))
        since = rng.uniform(1, 60)  # days after the reference
        seen = False
        for _ in range(2):
            x = values(rng, "plain", REFERENCE_DAYS + 64)
            when = np.arange(len(x))[:, None] - REFERENCE_DAYS + hour / 24
            x = x + shift * x.std() * (when >= since)
            at = int(since * 24)
            seen |= alarms(x, hour)[at : at + 25].any()
        found += seen
    print(f"\nfound within 24 hours: {found} of 50 histories with two measures moved by {shift} standard deviations")
    assert found >= 48


# ---- planted changes, through the logs -----------------------------------------------------------------------------------------
SHUFFLED = pl.col("propensity").shuffle(seed=1)
PLANTED = {
    "a unit changed": {"activity": {"minutes": pl.col("minutes") * 60}},
    "another policy acts as retain": {"decisions": {"bonus": pl.when(pl.col("policy") == "retain").then(pl.col("bonus") * 2).otherwise("bonus")}},
    "propensities per cent": {"decisions": {"propensity": pl.col("propensity") * 2}},
    "propensities of other decisions": {"decisions": {"propensity": SHUFFLED}},
}


def planted(read, changes, since):
    """`read` with expressions for columns of decisions or activity from `since` on."""
    frames = {}
    for table, at in (("decisions", "decided_at"), ("activity", "occurred_at")):
        new = [pl.when(pl.col(at) >= since).then(to).otherwise(name).alias(name) for name, to in changes.get(table, {}).items()]
        frames[table] = getattr(read, table).with_columns(new)
    return replace(read, **frames)


def lived(root, seed):
    """(platform, what its logs hold after the first ten days, the moment of a retraining) of 2,000 players and 38 days of the simulated platform."""
    root.mkdir()
    worlds.write_logs(worlds.world("arena"), root, PLAYERS, 38, seed=seed)
    platform = load_platform(root)
    read = records.read_records(platform)
    start = read.decisions["decided_at"].min() + timedelta(days=10)
    kept = {"decisions": read.decisions.filter(pl.col("decided_at") >= start), "activity": read.activity.filter(pl.col("occurred_at") >= start).collect()}
    shutil.rmtree(root)
    read = replace(read, **kept)
    return platform, read, monitoring.reached(read).full - timedelta(days=8)


def before(read, moment):
    return replace(read, decisions=read.decisions.filter(pl.col("decided_at") < moment), activity=read.activity.filter(pl.col("occurred_at") < moment))


def look(history, references, read, moment):
    """What the monitor finds in `read` at a moment, against what the retraining of this history saw, which is kept in `references`."""
    platform, whole, cut = history
    now = before(read, moment)
    reached = monitoring.reached(now)
    hours = (reached.decisions.hour, reached.activity.hour, reached.full.hour)
    if hours not in references:
        references[hours] = monitoring.reference_of(platform, before(whole, cut), reached)
    return monitoring.look(platform, now, *references[hours], cut)


@pytest.mark.timeout(7_200)
def test_planted_changes_are_found_in_the_logs(tmp_path):
    """A retraining after 20 days, the change one to three days later, at any hour; PLANTED_HISTORIES of it.

    Looked at 8, 16 and 24 hours after it, and three times before it, when there is nothing to find.
    """
    histories, found, wrong, looks = int(os.environ.get("PLANTED_HISTORIES", "50")), Counter(), 0, 0
    for number in range(histories):
        history, references = lived(tmp_path / str(number), 1_000 + number), {}
        _, whole, cut = history
        since = cut + timedelta(hours=int(np.random.default_rng([SEED, 8, number]).integers(24, 72)))
        for hours in (0, -8, -16):
            wrong, looks = wrong + bool(look(history, references, whole, since + timedelta(hours=hours))), looks + 1
        for name, changes in PLANTED.items():
            changed = planted(whole, changes, since)
            found[name] += any(look(history, references, changed, since + timedelta(hours=hours)) for hours in (24, 16, 8))
    print(f"\nfound within 24 hours of {histories} histories: {dict(found)}; {wrong} of {looks} looks before the change found something")
    assert all(found[name] >= 0.95 * histories for name in PLANTED)
    assert wrong <= 0.05 * looks


# ---- the balance probe ---------------------------------------------------------------------------------------------------------
PROBED, STATE, ACTING = 600, 64, 3  # players never trained on (0.3 of them), numbers of the balanced state, policies


def balanced_states(rng, days, leak):
    """(state [days, players, Z], who acts [days, players]): what is a player's own, the day's chance, and what is left in it of who acts; `leak` [days]."""
    own = rng.standard_normal((PROBED, STATE), np.float32) / 2
    state = rng.standard_normal((days, PROBED, STATE), np.float32) + own
    toward = np.linalg.qr(rng.standard_normal((STATE, ACTING)))[0].T.astype(np.float32)
    chance = np.exp(leak[:, None, None] * (state @ toward.T))
    chance = np.cumsum(chance / chance.sum(2, keepdims=True), 2)
    return state, (rng.random((days, PROBED, 1)) > chance).sum(2)


def lost(rng, leak):
    """[days after the promotion, windows] how rarely chance alone takes that day's probe as far; the first week of `leak` lies before it."""
    state, acting = balanced_states(rng, len(leak), leak)
    names = [str(k) for k in range(ACTING)]

    def probe(*windows):
        """Of the days [from, to) of each window."""
        pieces, first = [np.arange(*window) for window in windows], min(window[0] for window in windows)
        inside = np.arange(first, max(window[1] for window in windows))
        day = np.repeat(inside, PROBED)
        masks = [np.isin(day, piece) for piece in pieces]
        return monitoring.probe(state[inside].reshape(-1, STATE), acting[inside].ravel(), np.tile(np.arange(PROBED), len(inside)), names, masks)

    before = {window: probe(*((at, at + window) for at in range(0, LEVEL_DAYS - window + 1, window))) for window in WINDOWS}
    found = np.ones((len(leak) - LEVEL_DAYS, len(WINDOWS)))
    for day in range(len(found)):
        for w, (window, was) in enumerate(before.items()):
            if day + 1 >= window:
                now = probe((LEVEL_DAYS + day + 1 - window, LEVEL_DAYS + day + 1))
                z = (now.accuracy - was.accuracy) / math.sqrt(now.variance + was.variance)
                found[day, w] = stats.t.sf(z, now.players - 1)
    return found


@pytest.mark.timeout(14_400)
def test_false_alarms_of_the_balance_probe():
    """A day's look at each of 90 days; its budget is a part of what drift may spend, so none is expected in 200 histories. PROBED_HISTORIES of them."""
    histories = int(os.environ.get("PROBED_HISTORIES", "200"))
    p = np.array([lost(np.random.default_rng([SEED, 5, history]), np.full(LEVEL_DAYS + HORIZON, 0.5)) for history in range(histories)])
    wrong = int((p < monitoring.balance_allowed(TESTS + 1)).any((1, 2)).sum())
    looks = [f"{(p[:, window - 1 :, w] < 0.05).mean():.3f} and {(p[:, window - 1 :, w] < 0.001).mean():.4f}" for w, window in enumerate(WINDOWS)]
    print(
        f"\nbalance probe: false alarms in {wrong} of {histories} quiet histories of {HORIZON} days; looks below 0.05 and 0.001 by window: {', '.join(looks)}"
    )
    assert wrong <= 0.05 * histories


@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("after", [1.0, 1.5, 2.0])
def test_who_acts_told_by_the_state_again(after):
    """From some day on the choice of who acts follows the state more than it did."""
    within, accuracy = [], []
    for history in range(50):
        leak = np.full(LEVEL_DAYS + 21, 0.5)
        leak[LEVEL_DAYS + 7 :] = after
        found = (lost(np.random.default_rng([SEED, 6, history]), leak) < monitoring.balance_allowed(TESTS + 1)).any(1)
        assert not found[:7].any()
        within.append(int(np.argmax(found[7:])) + 1 if found[7:].any() else None)
    rng = np.random.default_rng([SEED, 7])
    for strength in (0.5, after):
        state, acting = balanced_states(rng, 7, np.full(7, strength))
        every = [np.ones(7 * PROBED, bool)]
        accuracy.append(monitoring.probe(state.reshape(-1, STATE), acting.ravel(), np.tile(np.arange(PROBED), 7), ["a", "b", "c"], every).accuracy)
    print(f"\nbalance: accuracy of a week's probe {accuracy[0]:.2f}, then {accuracy[1]:.2f}: found after days {sorted(Counter(within).items(), key=str)}")
    assert sum(day is not None for day in within) >= 48


@pytest.fixture(scope="module")
def champion(tmp_path_factory):
    """(policy, promises) of a platform as large as the demo's; FASTQ_BENCH_WORKSPACE names a workspace that has been through `fastq demo`, else it is made."""
    from fastq import load_policy
    from pipelines.monitor import promises

    root = os.environ.get("FASTQ_BENCH_WORKSPACE")
    if root is None:
        root = str(tmp_path_factory.mktemp("demo") / "shop")
        subprocess.run([sys.executable, "-m", "fastq.cli", "demo", root, "--json"], check=True, stdout=subprocess.DEVNULL)
    platform = load_platform(root)
    read = records.read_tables(platform)
    policy = load_policy(f"models:/{platform.platform}@champion", platform.root)
    return policy, promises(policy, windows.build(platform, read, features.build_rows(platform, read)))


def a_day_of(policy, history):
    """[players, M] outcomes and expected ones of one day of fresh players, 14 of whose days other policies decided before."""
    life = worlds.Simulation(worlds.world("arena"), PLAYERS, SEED + history)
    for _ in range(14):
        before = life.behaviour()
        life.step(before.action, [life.world.policies[k] for k in before.policy])
    states = PlayerStates(**life.states())
    action = policy.recommend(states).action
    expected = policy.parts(policy.encode(states), action[:, None])[:, 0, :, 0]
    served = life.served()
    return life.step(action, ["fastq"] * PLAYERS)[served], expected[served]


def told(policy, outcomes, expected):
    """As the monitor has them."""
    names = list(policy.platform.objectives)
    said = {name: outcomes[:, m] for m, name in enumerate(names)} | {f"expected {name}": expected[:, m] for m, name in enumerate(names)}
    at = datetime(2026, 3, 1, 12, tzinfo=UTC)
    return pl.DataFrame({"player_id": [str(p) for p in range(len(outcomes))], "decided_at": [at] * len(outcomes), **said})


@pytest.mark.timeout(3_600)
@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 1), (0.1, 48, 50)])
def test_outcomes_worse_than_promised_by_a_tenth(champion, share, least, most):
    """Of the champion itself on fresh players, one day of decisions: each outcome a tenth worse than it would be, and none, against the gate's own promise."""
    policy, promised = champion
    worse = 1 - share * np.sign(policy.platform.weights)
    found, keys = 0, Counter()
    for history in range(50):
        outcomes, expected = a_day_of(policy, history)
        seen = monitoring.broken_promises(told(policy, outcomes * worse, expected), promised)
        found += bool(seen)
        keys.update(each.key for each in seen)
    for promise in promised:
        print(f"\n{promise.name}: {promise.value:.4f}, at least {promise.low:.4f}; beyond what is expected at least {promise.beyond}", end="")
    print(f"\nfound within 24 hours of becoming known: {found} of 50 histories with each outcome {share:.0%} worse; {dict(keys)}")
    assert least <= found <= most


@pytest.mark.timeout(3_600)
def test_lift_covers_at_all_times():
    """Players come over the first 30 days, act at rates of their own, and are looked at after each of 90 days; a tenth is held out."""
    worlds, missed, widths = 400, 0, []
    for world in range(worlds):
        rng = np.random.default_rng([SEED, 3, world])
        held = rng.random(PLAYERS) < 0.1
        own, rate, arrives = rng.gamma(2, 0.5, PLAYERS), rng.uniform(0.2, 1, PLAYERS), rng.integers(0, 30, PLAYERS)
        total, count, squares, failed = np.zeros(PLAYERS), np.zeros(PLAYERS), np.zeros(PLAYERS), False
        for day in range(90):
            acts = (arrives <= day) & (rng.random(PLAYERS) < rate)
            x = np.where(acts, own + rng.normal(0, 1, PLAYERS) + np.where(held, 0.0, 0.1), 0.0)
            total, count, squares = total + x, count + acts, squares + x**2
            if min((count[side] > 0).sum() for side in (~held, held)) < 2:
                continue  # `fastq lift` has no row yet
            sides = []
            for side in (~held, held):
                n, players = count[side].sum(), int((count[side] > 0).sum())
                value = total[side].sum() / n
                error = math.sqrt(np.square((total[side] - value * count[side]) / n).sum() * players / (players - 1))
                sides.append(Mean(value, error, math.sqrt(squares[side].sum() / n - value**2), players, int(n)))
            _, low, high = difference(*sides)
            failed |= not low <= 0.1 <= high  # rates do not depend on what players are worth, so a decision's mean is a player's
        missed += failed
        widths.append(high - low)
    print(f"\nlift: the truth left the 95 % interval at any of 90 looks in {missed} of {worlds} worlds; width after 90 days {np.median(widths):.3f}")
    assert missed <= stats.binom.ppf(0.999, worlds, 0.05)


@pytest.mark.parametrize("excess", [0.15, 0.3, 1.0])
def test_a_broken_guardrail_is_rolled_back_in_time(excess):
    """Before what is spent beyond the ceiling reaches a tenth of what the ceiling allows in 30 days, that is three days' worth."""
    ceiling, intime = 0.12, 0
    for run in range(50):
        rng = np.random.default_rng([SEED, 4, run])
        own = rng.gamma(2, 0.5, PLAYERS)
        x = np.empty((0,))
        for day in range(1, 31):
            x = np.append(x, own * rng.gamma(1, 1, PLAYERS) * ceiling * (1 + excess))
            mean = monitoring.mean_by_player(x, np.tile(np.arange(PLAYERS), day))
            if mean.value - anytime_radius(mean.error, mean.scale, PLAYERS - 1, 0.98) > ceiling:
                break
        intime += excess * day <= 3
    print(f"\nguardrail {excess:.0%} above its ceiling: rolled back in time in {intime} of 50 runs")
    assert intime >= 48


# ---- a warm start beside a cold one --------------------------------------------------------------------------------------------
def until(platform, read, back):
    """Transitions of all but the last `back` days of decisions and activity."""
    cut = read.decisions["decided_at"].max() - timedelta(days=back)
    known = before(read, cut) if back else read
    return windows.build(platform, known, features.build_rows(platform, known))


def trained(platform, data, start=None):
    """(policy, seconds of processor time) of one training."""
    began = time.process_time()
    policy = learner.train(platform, data, start=start)
    return policy, time.process_time() - began


@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("name", ["arena", "narrow", "moody", "costly", "settled"])
def test_a_warm_start_beside_a_cold_one(name, tmp_path):
    """From the policy of all days but the last, beside training afresh on all of them: the value on players held out, paired, and processor time.

    WARM_PLAYERS (600), WARM_DAYS (30); WARM_SEEDS (2) platforms, each with a luck of its own, and each training twice for its time.
    """
    torch.set_num_threads(1)
    players, days = int(os.environ.get("WARM_PLAYERS", "600")), int(os.environ.get("WARM_DAYS", "30"))
    ratios, behind = [], []
    for seed in range(int(os.environ.get("WARM_SEEDS", "2"))):
        root = tmp_path / str(seed)
        root.mkdir()
        worlds.write_logs(worlds.world(name), root, players, days, seed=seed)
        platform = load_platform(root)
        read = records.read_records(platform)
        read = replace(read, activity=read.activity.collect().lazy())
        now, yesterday = until(platform, read, 0), until(platform, read, 1)
        old, _ = trained(platform, yesterday)
        (cold, cold_s), (warm, warm_s) = trained(platform, now), trained(platform, now, old)
        cold_s, warm_s = cold_s + trained(platform, now)[1], warm_s + trained(platform, now, old)[1]
        ratios.append(warm_s / cold_s)
        found = evaluation.evaluate(warm, now, cold).difference
        behind.append(found["high"])
        truth = [
            worlds.true_values(worlds.world(name), lambda states, by=by: by.recommend(PlayerStates(**states), explore=False).action, 1_500, 30).total
            for by in (old, cold, warm)
        ]
        print(
            f"\n{name} {seed}: {len(now):,} decisions, warm {warm_s / 2:.2f} of {cold_s / 2:.2f} CPU-s, {ratios[-1]:.2f}; held out, warm less cold "
            f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}); true value a day: "
            f"old {truth[0]:.3f}, cold {truth[1]:.3f}, warm {truth[2]:.3f}"
        )
    print(f"{name}: a warm start takes {np.median(ratios):.2f} of the cold one's time")
    assert np.median(ratios) <= 0.3
    assert min(behind) >= 0, "on players held out a warm start is worth no less than the cold one, as far as they can tell"


# ---- a whole turn on two nodes ----------------------------------------------------------------------------------------------------
@pytest.mark.timeout(3_600)
def test_a_whole_turn_on_two_nodes_of_which_one_is_killed(tmp_path):
    """`retrain` with features and both stages on a cluster of two nodes; one is killed while they learn and another takes its place: equal to one machine."""
    import ray
    from ray.cluster_utils import Cluster

    from fastq import load_policy
    from pipelines.retrain import retrain

    torch.set_num_threads(1)
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    places = {name: tmp_path / name for name in ("alone", "together")}
    places["alone"].mkdir()
    worlds.write_logs(worlds.world("arena"), places["alone"], 300, 24, seed=100)
    shutil.copytree(places["alone"], places["together"])
    # its nodes would set a handler of SIGTERM, which in the thread that tells of progress, and adds one, cannot be done
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False}, shutdown_at_exit=False)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)  # on the head, while there is no other node to be on
    second, killed, seen = cluster.add_node(**node), [], []
    try:
        for place, more in (("alone", {}), ("together", {"ray": cluster.address})):
            file = places[place] / "fastq.yaml"
            tree = yaml.safe_load(file.read_text())
            tree |= {"training": {"preset": "default", "epochs": 4, "batch_size": 256, "workers": 2 if more else 1}, "services": more}
            file.write_text(yaml.safe_dump(tree))

        def strike(stage, done, total, metrics):
            seen.append((stage, done))
            if stage == "representation" and done >= 1 and not killed:
                killed.append(second.unique_id)
                second.kill_raylet(check_alive=False)  # and with it everything on the node
                cluster.add_node(wait=False, **node)  # not the number of nodes that `wait` looks for: the dead one is still counted

        one = retrain(load_platform(places["alone"]), on_progress=lambda *_: None)
        two = retrain(load_platform(places["together"]), on_progress=strike)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert killed, "a node was killed while they learned"
    policies = [load_policy(f"models:/arena/{found['version']}", places[place]) for found, place in ((one, "alone"), (two, "together"))]
    assert policies[0].details["data"] == policies[1].details["data"], "the data half exactly"
    platform = load_platform(places["alone"])
    read = records.read_tables(platform)
    data = windows.build(platform, read, features.build_rows(platform, read))
    held_out = np.flatnonzero(windows.held_out_players(data.player_ids, platform.training.holdout, platform.training.seed)[data.player])
    values = [policy.recommend(data.states(held_out), explore=False).value.mean() for policy in policies]
    estimates = [{(e["policy"], e["objective"], e["estimator"]): e["value"] for e in found["estimates"]} for found in (one, two)]
    apart = max(abs(estimates[1][key] - value) / max(abs(value), 1e-9) for key, value in estimates[0].items() if value is not None)
    print(
        f"\nheld-out value {values[0]:.6f} on one machine, {values[1]:.6f} on two nodes, "
        f"{abs(values[1] / values[0] - 1):.1e} apart; estimates {apart:.1e} apart"
    )
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    assert one["promoted"] == two["promoted"]
    assert [done for stage, done in seen if stage == "value and actor"][-1] == 4


# ---- what the flow costs over the library --------------------------------------------------------------------------------------
BARE = """
import sys
import torch
torch.set_num_threads(1)
from fastq import evaluation, features, learner, load_platform, overlap, records, validation, windows
from fastq.workspace import Workspace
platform = load_platform("fastq.yaml")
read = records.read_records(platform)
assert validation.validate(platform, read, None).passed
overlap.overlaps(platform, overlap.chances(platform, read))
records.write_tables(read, Workspace(platform.root))
read = records.read_tables(platform)
data = windows.build(platform, read, features.build_rows(platform, read))
policy = learner.train(platform, data, Workspace(platform.root).runs)
evaluation.evaluate(policy, data)
policy.save(platform.root / "policy")
"""


def spent(command, root):
    """(seconds by the clock, seconds of processor time with all children) of one command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=root, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode in (0, 1), done.stderr[-2000:]  # a model this small may well be refused
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.timeout(3_600)
def test_what_the_flow_costs_over_the_bare_library(tmp_path):
    """Prefect with its temporary server, Feast with both stores, MLflow, reports, pictures and promises: at most 20 s or 5 % over the library's own calls."""
    players, days = int(os.environ.get("FLOW_PLAYERS", "600")), 30
    worlds.write_logs(worlds.world("arena"), tmp_path, players, days, seed=0)
    fastq = str(Path(sys.executable).with_name("fastq"))
    (flow, flow_cpu), (bare, bare_cpu) = spent([fastq, "retrain", "--json"], tmp_path), spent([sys.executable, "-c", BARE], tmp_path)
    print(f"\nretraining on {players} players x {days} days: flow {flow:.1f} s ({flow_cpu:.1f} CPU-s), library {bare:.1f} s ({bare_cpu:.1f} CPU-s)")
    assert flow_cpu - bare_cpu <= max(20, 0.05 * bare_cpu)
