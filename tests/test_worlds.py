"""The simulated platforms: exact laws, the same luck for everyone, logs that say what the world knows; and the one real log."""

import hashlib
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import yaml

from fastq import features, records, worlds
from fastq.errors import ConfigurationError, RequestError
from fastq.platform import load_platform

ARENA = worlds.world("arena")
PLAYERS, DAYS, SEED, END = 60, 20, 103, date(2026, 3, 20)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A small log: its platform, its tables, and the simulation lived again to the midnight at which the log was cut."""
    directory = tmp_path_factory.mktemp("arena")
    platform = load_platform(worlds.write_logs(ARENA, directory, players=PLAYERS, days=DAYS, seed=SEED, end=END))
    tables = {name: pl.read_parquet(directory / "logs" / name / "*.parquet") for name in ("decisions", "activity", "proposals")}
    simulation = worlds.Simulation(ARENA, PLAYERS, SEED)
    names = np.array(ARENA.policies)
    for _ in range(DAYS):
        behaviour = simulation.behaviour()
        simulation.step(behaviour.action, names[behaviour.policy].tolist())
    return platform, tables, simulation


def constant(*action):
    return lambda states: np.tile(np.array(action, float), (len(states["history"]), 1))


def test_a_density_is_the_gaussian_of_the_policy_and_a_bound_is_an_atom():
    mean = np.array([[5.0, 10.0, 2.0]])
    sigma = np.array(ARENA.noise)
    # at the mean: 1 / (2.5066 * 1) / (2.5066 * 3.5) / (2.5066 * 0.6)
    assert worlds.action_density(ARENA, mean, mean)[0] == pytest.approx((2 * np.pi) ** -1.5 / (1.0 * 3.5 * 0.6))
    # one standard deviation off in one dimension: exp(-1/2) of it
    off = mean + np.array([0, sigma[1], 0])
    assert worlds.action_density(ARENA, off, mean)[0] == pytest.approx(np.exp(-0.5) * worlds.action_density(ARENA, mean, mean)[0])
    for bound in ([1, 10, 2], [5, 0, 2], [5, 50, 2], [5, 10, 6]):
        assert np.isnan(worlds.action_density(ARENA, np.array([bound], float), mean)[0])


def test_densities_integrate_to_the_mass_that_is_no_atom():
    simulation = worlds.Simulation(ARENA, 1, 100)
    simulation.step(simulation.behaviour().action)
    mean = simulation.proposals()[0]
    low, high = worlds.bounds(ARENA).T
    rng = np.random.default_rng(0)
    points = rng.uniform(low, high, (400_000, 3))
    drawn = np.clip(mean[:, None] + rng.standard_normal((3, 200_000, 3)) * np.array(ARENA.noise), low, high)
    for k in range(3):
        mass = worlds.action_density(ARENA, points, mean[k]).mean() * np.prod(high - low)
        inside = ((drawn[k] > low) & (drawn[k] < high)).all(1).mean()
        assert mass == pytest.approx(inside, abs=0.03)  # 400,000 points: standard error near 0.006


def test_propensities_are_importance_weights_in_the_log():
    """E over the log of [pi_k(a|s) / pi_p(a|s)] is policy k's mass away from the bounds, whoever acted: all but the atoms."""
    simulation = worlds.Simulation(replace(ARENA, noise=(4.0, 12.0, 2.0)), 3_000, 101)  # wide laws overlap, so the mean settles
    behaviour = simulation.behaviour()
    acted = behaviour.propensity[np.arange(3_000), behaviour.policy]
    for k in range(3):
        ratio = np.nan_to_num(behaviour.propensity[:, k] / acted)
        atoms = (behaviour.proposals[:, k] == worlds.bounds(ARENA).T[:, None]).any((0, 2)).mean()
        assert ratio.mean() == pytest.approx(1 - atoms, abs=0.08)


def test_assignment_probabilities_are_the_frequencies():
    simulation = worlds.Simulation(ARENA, 2_000, 102)
    chosen, said = [], []
    for _ in range(10):
        behaviour = simulation.behaviour()
        chosen.append(np.eye(3)[behaviour.policy])
        said.append(behaviour.assignment)
        simulation.step(behaviour.action)
    chosen, said = np.concatenate(chosen), np.concatenate(said)
    np.testing.assert_allclose(said.sum(1), 1, rtol=1e-12)
    assert said.min() >= ARENA.selection_floor
    for k in range(3):
        edges = np.quantile(said[:, k], np.linspace(0, 1, 6))
        edges[-1] += 1e-9
        for low, high in pairwise(edges):
            rows = (said[:, k] >= low) & (said[:, k] < high)
            assert chosen[rows, k].mean() == pytest.approx(said[rows, k].mean(), abs=4 * 0.5 / np.sqrt(rows.sum()))  # four standard errors at most
    assert np.ptp(said, axis=0).min() > 0.5, "each policy sees its own slice of the players"


def test_states_are_what_aggregating_the_logged_events_gives(logged):
    platform, tables, simulation = logged
    day = (pl.col("occurred_at").dt.date() - END).dt.total_days() + DAYS - 1
    how = {name: getattr(pl.col(name), measure.aggregate)() for name, measure in platform.state.measures.items()}
    cells = tables["activity"].group_by("player_id", day.alias("day")).agg(**how)
    expected = np.full((PLAYERS, DAYS, len(worlds.MEASURES)), np.nan)
    row = np.searchsorted(worlds.player_ids(PLAYERS), cells["player_id"].to_numpy())
    expected[row, cells["day"].to_numpy()] = cells.select(worlds.MEASURES).to_numpy()
    history = simulation.states()["history"]
    assert history.shape == (PLAYERS, 30, 7)
    assert np.isnan(history[:, :10]).all()
    np.testing.assert_allclose(history[:, 10:], expected, rtol=1e-12)


def test_states_are_those_that_the_feature_code_makes_of_the_logs(logged):
    from fastq.records import read_records

    platform, _, simulation = logged
    at = datetime(END.year, END.month, END.day, 6, tzinfo=UTC) + timedelta(days=1)
    records = read_records(platform)
    assert records.counts["decisions"].quarantined == 0
    frame = features.online_frame(platform, records, at).sort("player_id")
    mine, theirs = simulation.states(), features.states_at(platform, frame, at)
    np.testing.assert_allclose(theirs.history, mine["history"], rtol=1e-6)
    np.testing.assert_allclose(theirs.actions, mine["actions"], rtol=1e-6)
    # the log is cut at midnight, six hours before these states: the last day's outcomes are in the world's states only
    np.testing.assert_allclose(theirs.objectives[:, :-2], mine["objectives"][:, :-2], rtol=1e-6)
    assert np.isnan(theirs.objectives[:, -1]).all()
    assert np.isnan(mine["objectives"][:, -1, 0]).all()
    assert not np.isnan(mine["objectives"][:, -1, 1:]).all()
    assert list(theirs.policies) == mine["policies"]
    assert theirs.attributes.equals(mine["attributes"])


def test_the_logs_follow_the_contract(logged):
    platform, tables, _ = logged
    decisions, proposals, activity = tables["decisions"], tables["proposals"], tables["activity"]
    assert platform.policies == list(ARENA.policies)
    assert platform.objectives["cost"].weight == -1
    assert platform.objectives["cost"].ceiling == ARENA.ceiling
    assert decisions["decision_id"].n_unique() == len(decisions)
    assert decisions["decided_at"].dtype == pl.Datetime("us", "UTC")
    assert decisions["decided_at"].dt.hour().unique().to_list() == [6]
    assert decisions["decided_at"].dt.date().max() == END == activity["occurred_at"].dt.date().max()
    assert decisions.group_by("policy").len()["len"].min() > 0.1 * len(decisions)
    # events come after the day's decision, and never on another day
    assert (activity["occurred_at"].dt.time() > datetime(1, 1, 1, 6, 30).time()).mean() > 0.99  # noqa: DTZ001
    assert activity["occurred_at"].dt.hour().min() >= 6
    # a null propensity is exactly an action on a bound
    low, high = platform.bounds.T
    action = decisions.select(platform.dimension_names).to_numpy()
    assert ((action >= low) & (action <= high)).all()
    on_bound = ((action == low) | (action == high)).any(1)
    assert 0 < on_bound.mean() < 0.25
    assert (decisions["propensity"].is_null().to_numpy() == on_bound).all()
    # outcomes: the last day unknown, `returns` of the day before too
    age = (END - decisions["decided_at"].dt.date()).dt.total_days()
    assert (decisions["ltv"].is_null() == (age == 0)).all()
    assert (decisions["returns"].is_null() == (age <= 1)).all()
    # proposals: one row per policy; the acting policy's is the executed action, with the same density and assignment
    assert len(proposals) == 3 * len(decisions)
    both = decisions.join(proposals, on=["decision_id", "policy"], suffix="_p")
    for column in (*platform.dimension_names, "propensity", "assignment"):
        assert both[column].equals(both[f"{column}_p"].rename(column)), column
    # `returns` is coming back the next day
    came = activity.select("player_id", day=pl.col("occurred_at").dt.date()).unique().with_columns(came=1.0)
    back = decisions.drop_nulls("returns").with_columns(day=pl.col("decided_at").dt.date() + timedelta(days=1)).join(came, on=["player_id", "day"], how="left")
    assert (back["came"].fill_null(0.0) == back["returns"]).all()


def test_writing_again_gives_the_same_logs_and_leaves_nothing_of_the_old(tmp_path):
    def digest():
        return {str(p.relative_to(tmp_path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "logs").rglob("*.parquet")}

    worlds.write_logs(ARENA, tmp_path, players=20, days=5, seed=1, end=END)
    assert len(digest()) == 3 * 5 + 1
    worlds.write_logs(ARENA, tmp_path, players=20, days=3, seed=1, end=END)
    first = digest()
    worlds.write_logs(ARENA, tmp_path, players=20, days=3, seed=1, end=END)
    assert digest() == first
    assert len(list((tmp_path / "logs" / "decisions").iterdir())) == 3
    worlds.write_logs(ARENA, tmp_path, players=20, days=3, seed=2, end=END)
    assert digest() != first


def test_the_default_log_ends_yesterday(tmp_path):
    worlds.write_logs(ARENA, tmp_path, players=5, days=2)
    newest = max(p.stem for p in (tmp_path / "logs" / "decisions").glob("*.parquet"))
    assert abs((datetime.now(UTC).date() - date.fromisoformat(newest)).days - 1) <= 1  # midnight may pass under the test


def test_the_same_actions_meet_the_same_luck():
    one, two = (worlds.true_values(ARENA, constant(5, 8, 1), players=50, days=6, seed=104, burn_in=4) for _ in range(2))
    np.testing.assert_array_equal(one.by_player, two.by_player)
    # players keep their luck in a larger population, and copies of a player share it
    more = worlds.true_values(ARENA, constant(5, 8, 1), players=80, days=6, seed=104, burn_in=4)
    np.testing.assert_array_equal(one.by_player, more.by_player[:50])
    simulation = worlds.Simulation(ARENA, 30, 104)
    simulation.step(simulation.behaviour().action)
    copies = simulation.copy(3)
    for _ in range(3):
        action = simulation.behaviour().action
        repeated = copies.behaviour().action
        np.testing.assert_array_equal(repeated, np.concatenate([action] * 3))
        np.testing.assert_array_equal(copies.step(repeated), np.concatenate([simulation.step(action)] * 3))
    # another action for one player changes nobody else's day
    other = simulation.copy()
    action = simulation.behaviour().action
    changed = action.copy()
    changed[7] = [20, 0, 6]
    difference = (simulation.step(action) != other.step(changed)).any(1)
    assert difference[7]
    assert not np.delete(difference, 7).any()


def test_true_values_add_up_and_refuse_nonsense():
    value = worlds.true_values(ARENA, "spend", players=60, days=5, seed=100, burn_in=3)
    assert value.total == pytest.approx(value.objectives @ np.array(ARENA.weights))
    assert value.total == pytest.approx(value.by_player.mean())
    np.testing.assert_allclose(value.per_decision * value.decided, value.objectives)
    assert 0.9 < value.decided <= 1
    with pytest.raises(RequestError, match="nobody"):
        worlds.true_values(ARENA, "nobody", players=5, days=1, seed=0, burn_in=0)
    with pytest.raises(RequestError, match="shape"):
        worlds.true_values(ARENA, lambda states: np.zeros((3, 3)), players=5, days=1, seed=0, burn_in=0)
    with pytest.raises(RequestError, match="arena"):
        worlds.world("atlantis")


def test_actions_far_outside_what_any_policy_does_are_bad():
    def total(act):
        return worlds.true_values(ARENA, act, players=300, days=20, seed=100, burn_in=7).total

    mixture = total("mixture")
    for action in ([5, 50, 1], [20, 8, 1], [1, 8, 1], [5, 8, 6]):
        assert total(constant(*action)) < 0.85 * mixture, action


@pytest.mark.slow
def test_the_best_behaviour_policy_stands_at_most_35_percent_of_the_way():
    best = worlds.best_known(ARENA, generations=20, population=32, players=100, days=18)
    myopic = worlds.best_known(ARENA, generations=20, population=32, players=100, days=18, myopic=True)

    def total(act):
        return np.mean([worlds.true_values(ARENA, act, players=500, days=30, seed=seed).total for seed in (100, 101)])

    mixture, top = total("mixture"), total(best)
    assert top > 1.2 * mixture
    assert max(total(name) for name in ARENA.policies) <= mixture + 0.35 * (top - mixture)
    assert total(myopic) <= mixture + 0.85 * (top - mixture), "looking no further than tomorrow must cost something"
    assert worlds.true_values(ARENA, best, players=500, days=30, seed=102).per_decision[-1] <= ARENA.ceiling


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return worlds._fetched_wheel(tmp_path_factory.mktemp("downloads"))


def test_the_open_bandit_log_is_two_policies_with_true_propensities(tmp_path, wheel):
    text = worlds.open_bandit(tmp_path, wheel)
    assert "CC BY 4.0" in text
    assert "ZOZO" in text
    platform = load_platform(tmp_path)
    assert platform.action.kind == "catalogue"
    assert platform.policies == ["random", "bts"]
    assert platform.objectives["click"].discount == 0
    assert platform.state.measures == {}
    assert yaml.safe_load((tmp_path / "fastq.yaml").read_text())["state"]["window"] == 1
    decisions, players, items = (pl.read_parquet(tmp_path / "logs" / f"{name}.parquet") for name in ("decisions", "players", "items"))
    assert dict(decisions.group_by("policy").len().iter_rows()) == {"random": 10_000, "bts": 10_000}
    assert decisions["decision_id"].n_unique() == decisions["player_id"].n_unique() == len(players) == 20_000
    assert decisions["propensity"].is_between(0, 1, closed="right").all()
    assert decisions.filter(policy="random")["propensity"].unique().to_list() == [1 / 80]
    assert dict(decisions.group_by("policy").agg(pl.col("click").sum()).iter_rows()) == {"random": 38, "bts": 42}
    assert set(decisions["item_id"]) == set(items["item_id"])
    assert len(items) == 80
    assert items.columns[1:] == list(platform.action.features)
    assert players.columns[1:] == list(platform.state.attributes)
    assert sorted(players["position"].unique()) == ["1", "2", "3"]
    # true propensities: random's weights towards bts's law are not logged, but each policy's inverse propensities count the items
    inverse = decisions.group_by("policy").agg((1 / pl.col("propensity")).mean())
    assert dict(inverse.iter_rows())["bts"] == pytest.approx(80, rel=0.1)


def test_a_wheel_that_is_none_is_refused_with_a_sentence(tmp_path):
    wrong = tmp_path / worlds.OBP_WHEEL
    wrong.write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match=r"expected the wheel obp-0\.4\.1"):
        worlds.open_bandit(tmp_path, wrong)
    with pytest.raises(ConfigurationError, match="sha256"):
        worlds.open_bandit(tmp_path, cache=tmp_path)


# ---- worlds where actions are items, and where nothing is to be gained --------------------------------------------------------
CATALOGUE = worlds.world("catalogue")


def test_every_action_of_a_catalogue_is_an_item_and_its_logged_chance_is_how_often_it_comes():
    simulation = worlds.Simulation(CATALOGUE, 50, 11)
    names, what = worlds.items(CATALOGUE)
    assert len(set(names)) == len(names) == 135
    behaviour = simulation.behaviour()
    found = worlds.item_ids(CATALOGUE, behaviour.action)
    assert set(found) <= set(names)
    np.testing.assert_array_equal(worlds.nearest_items(CATALOGUE, behaviour.proposals), behaviour.proposals)
    means = simulation.proposals()
    law = worlds.action_density(CATALOGUE, what[None, :, None], means[:, None])  # [players, items, policies]
    np.testing.assert_allclose(law.sum(1), 1, rtol=1e-9)
    drawn = np.stack([simulation.behaviour(np.random.default_rng(i)).proposals for i in range(400)])
    for k in range(3):
        often = (drawn[:, :, k, None] == what).all(-1).mean(0)  # [players, items]
        error = np.sqrt(law[:, :, k] * (1 - law[:, :, k]) / 400)
        assert (np.abs(often - law[:, :, k]) <= 5 * error + 0.005).all()
    place, acted = [names.index(item) for item in found], behaviour.policy
    np.testing.assert_allclose(behaviour.propensity[np.arange(50), acted], law[np.arange(50), place, acted], rtol=1e-12)


def test_a_catalogue_is_logged_with_its_items_and_read_back(tmp_path):
    platform = load_platform(worlds.write_logs(CATALOGUE, tmp_path, players=30, days=5, seed=1, end=END))
    tables = records.read_records(platform)
    assert tables.counts["decisions"].quarantined == 0
    assert len(tables.items) == 135
    assert set(tables.decisions["item_id"]) <= set(worlds.items(CATALOGUE)[0])
    assert tables.decisions["propensity"].is_between(0, 1, closed="right").all()


def test_what_lies_between_two_levels_is_the_nearest_item():
    np.testing.assert_array_equal(worlds.nearest_items(CATALOGUE, np.array([[6.9, 12.0, 2.4]])), [[6, 10, 3]])
    assert worlds.item_ids(CATALOGUE, np.array([[6.9, 12.0, 2.4], [np.nan, 1, 1]])).tolist() == ["games6-bonus10-nudges3", None]


def test_where_a_policy_is_settled_it_is_as_good_as_what_the_search_finds_on_the_arena():
    settled = worlds.world("settled")
    values = {name: worlds.true_values(settled, name, players=400, days=20, seed=100, burn_in=7).total for name in (*settled.policies, worlds.MIXTURE)}

    def linear(states):
        weights = np.array(settled.first)
        summary = worlds.summarise(states["history"], states["actions"])
        return weights[:, 0] + summary @ weights[:, 1:].T

    without = worlds.true_values(settled, linear, players=400, days=20, seed=100, burn_in=7).total
    assert max(values, key=values.get) == "settled"
    assert without - values["settled"] < 0.05 * (values["settled"] - values[worlds.MIXTURE]), "its noise costs little"
