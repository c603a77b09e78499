"""The benchmark: what its rivals see and learn, that a stopped one goes on, and that its figures are what the cells say."""

import dataclasses
import functools
import json
import math
import os

import numpy as np
import pytest

from fastq import benchmark, features, records, windows, worlds
from fastq.errors import RequestError, WorkspaceError
from fastq.features import PlayerStates
from fastq.platform import load_platform


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A small arena: platform and windows."""
    directory = tmp_path_factory.mktemp("arena")
    platform = load_platform(worlds.write_logs(worlds.world(), directory, players=60, days=16, seed=7))
    tables = records.read_records(platform)
    return platform, windows.build(platform, tables, features.build_rows(platform, tables))


class TestWhatRivalsSee:
    def test_every_number_is_known_and_the_newest_row_comes_first(self, log):
        platform, data = log
        lesson = benchmark.lessons(platform, data)
        assert np.isfinite(lesson.x).all()
        width = data.matrix.shape[1]
        raw = data.raw(lesson.row[:50])[:, -1]
        known = np.isfinite(raw)
        expected = np.where(known, np.clip((raw - lesson.encoding.mean) / lesson.encoding.scale, -8, 8), 0)
        np.testing.assert_allclose(lesson.x[:50, :width], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(lesson.x[:50, width : 2 * width], known)

    def test_held_out_players_teach_no_rival(self, log):
        platform, data = log
        taught = set(data.player[benchmark.lessons(platform, data).row])
        held = np.flatnonzero(windows.held_out_players(data.player_ids, platform.training.holdout, platform.training.seed))
        assert len(held)
        assert taught.isdisjoint(held)

    def test_a_player_of_whom_nothing_is_known_has_a_state_too(self, log):
        platform, data = log
        lesson = benchmark.lessons(platform, data)
        x = lesson.features(PlayerStates(np.full((2, platform.state.window, len(platform.state.measures)), np.nan)))
        assert x.shape == (2, lesson.x.shape[1])
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(x[0], x[1])


def test_the_sum_of_a_week_stops_where_the_player_left_and_is_unknown_where_the_log_ends(log):
    platform, data = log
    # one player with nine decisions who left after the ninth, one with eight whose log ends
    n = 17
    player = np.repeat([0, 1], [9, 8])
    following = np.where(np.append(player[1:] == player[:-1], False), np.arange(n) + 1, -1)
    reward = np.zeros((n, len(platform.objectives)))
    reward[:, 0] = 2.0 ** np.arange(n)
    short = dataclasses.replace(data, reward=reward, following=following, terminated=np.arange(n) == 8, player=player, moment=np.zeros(n))
    lesson = benchmark.Lessons(platform, short, None, np.zeros((n, 1)), np.zeros((n, 3)), reward, np.arange(n))
    found = benchmark.weighted_sums(lesson, "boosting-week")
    np.testing.assert_array_equal(found[:3], [2**7 - 1, 2**8 - 2, 2**9 - 4])
    np.testing.assert_array_equal(found[3:9], [2**9 - 2**k for k in range(3, 9)])  # nothing follows somebody who left
    np.testing.assert_array_equal(found[9:11], [2**16 - 2**9, 2**17 - 2**10])
    assert np.isnan(found[11:]).all()
    np.testing.assert_array_equal(benchmark.weighted_sums(lesson, "boosting-now"), reward[:, 0])


def test_boosting_finds_what_an_action_does_and_stays_inside_the_bounds(log):
    platform, data = log
    low, high = platform.bounds.T
    reward = np.zeros_like(data.reward)
    reward[:, 0] = -(((data.action[:, 0] - 6.0) / 4) ** 2)  # six games are best for everybody
    lesson = benchmark.lessons(platform, dataclasses.replace(data, reward=reward))
    choose = benchmark.boosting(lesson, "boosting-now", seed=0)
    states = data.states(np.arange(40))
    action = choose(states)
    assert ((action >= low) & (action <= high)).all()
    np.testing.assert_array_equal(action, choose(states))
    assert np.abs(action[:, 0] - 6.0).mean() < 0.5 * np.abs(data.action[:40, 0] - 6.0).mean()


class TestCells:
    def test_what_is_kept_is_not_computed_again_and_what_was_cut_off_is(self, tmp_path):
        path, asked = tmp_path / "cell.json", []

        def compute():
            asked.append(1)
            return {"value": 1.5}

        assert benchmark.kept(path, compute) == benchmark.kept(path, compute) == {"value": 1.5}
        assert len(asked) == 1
        path.write_text('{"val')
        assert benchmark.kept(path, compute) == {"value": 1.5}
        assert len(asked) == 2

    def test_a_study_of_another_size_has_cells_of_its_own(self):
        study = benchmark.Study(players=100)
        assert study.key("arena") != benchmark.Study(players=200).key("arena")
        assert study.key("arena") != study.key("narrow")
        assert study.key("arena") == benchmark.Study(players=100, seeds=(5,), methods=("fastq",)).key("arena")

    @pytest.mark.slow
    def test_a_study_that_was_stopped_goes_on_where_it_was(self, tmp_path, monkeypatch):
        monkeypatch.setattr(benchmark, "best_known", lambda world: {"weights": np.zeros((3, 11)).tolist(), "mean": [0.0] * 10, "scale": [1.0] * 10})
        monkeypatch.setattr(benchmark, "TRUTH_PLAYERS", 40)
        monkeypatch.setattr(benchmark, "TRUTH_DAYS", 4)
        study = benchmark.Study(seeds=(0, 1), players=60, days=16, methods=("fastq", "boosting-now"))
        real, learned = benchmark.learned_cell, []

        def learning(method, world, seed, *rest):
            if len(learned) == 2:
                raise KeyboardInterrupt
            learned.append((method, seed))
            return real(method, world, seed, *rest)

        monkeypatch.setattr(benchmark, "learned_cell", learning)
        with pytest.raises(KeyboardInterrupt):
            benchmark.on_simulator(study, tmp_path)
        assert not list(tmp_path.rglob("logs-*"))  # what it wrote for itself is gone
        monkeypatch.setattr(benchmark, "learned_cell", lambda method, world, seed, *rest: learned.append((method, seed)) or real(method, world, seed, *rest))
        document = benchmark.on_simulator(study, tmp_path)
        assert learned == [(method, seed) for seed in (0, 1) for method in study.methods]
        rows = {row["method"]: row for row in document["worlds"][0]["rows"]}
        assert set(rows) == {"fastq", "boosting-now", "stretch", "retain", "spend", "mixture", "best-known"}
        assert rows["mixture"]["way"] == 0
        assert rows["best-known"]["way"] == pytest.approx(1)
        assert rows["fastq"]["lead"] == 0
        assert document["worlds"][0]["headline"]["against"] == "boosting-now"
        assert (tmp_path / "benchmark.png").stat().st_size > 1_000
        json.dumps(document, allow_nan=False)

        # the same by processes: what is kept is taken, what is not is computed there, by what the monkey has not patched
        missing = next(tmp_path.rglob("seed-1-boosting-now.json"))
        before = json.loads(missing.read_text())
        missing.unlink()
        shared = benchmark.on_simulator(study, tmp_path, processes=2)
        assert not list(tmp_path.rglob("logs-*"))
        assert json.loads(missing.read_text())["value"] != before["value"], "another truth than that of few players and days"
        missing.write_text(json.dumps(before))
        again = benchmark.on_simulator(dataclasses.replace(study, worlds=("arena", "arena")), tmp_path, processes=2)
        assert again["worlds"] == document["worlds"]
        assert shared["worlds"] != document["worlds"]
        monkeypatch.setattr(benchmark, "_alone", functools.partial(os._exit, 1))
        with pytest.raises(WorkspaceError, match=r"a process ended before its cell was done.*fewer --processes"):
            benchmark.on_simulator(study, tmp_path, processes=2)


@pytest.mark.slow
def test_on_a_platforms_own_logs_all_are_estimated_on_players_that_none_saw(tmp_path):
    platform = load_platform(worlds.write_logs(worlds.world(), tmp_path, players=80, days=16, seed=3))
    document = benchmark.on_logs(platform, ("boosting-now",))
    rows = {row["method"]: row for row in document["rows"]}
    assert set(rows) == {"fastq", "boosting-now", "stretch", "retain", "spend"}
    assert all(
        row["objective"] is None and math.isfinite(row["value"]) and row["low"] <= row["value"] <= row["high"] and row["verdict"] for row in rows.values()
    )
    assert rows["boosting-now"]["seconds"] > 0
    cells = tmp_path / ".fastq" / "benchmark"
    before = {path: path.stat().st_mtime_ns for path in cells.rglob("boosting-now.json")}
    again = benchmark.on_logs(platform, ("boosting-now",))
    assert {path: path.stat().st_mtime_ns for path in cells.rglob("boosting-now.json")} == before
    assert again["rows"] == document["rows"]
    json.dumps(document, allow_nan=False)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A small log of the catalogue: platform and windows."""
    directory = tmp_path_factory.mktemp("catalogue")
    platform = load_platform(worlds.write_logs(worlds.world("catalogue"), directory, players=60, days=12, seed=7))
    tables = records.read_records(platform)
    return platform, windows.build(platform, tables, features.build_rows(platform, tables))


@pytest.mark.parametrize("large", [False, True])
def test_boosting_ranks_the_items_of_a_catalogue(shop, monkeypatch, large):
    platform, data = shop
    if large:  # only items near what the policies would propose are ranked, as in a catalogue of thousands
        monkeypatch.setattr(benchmark, "NEAREST_ITEMS", 40)
    reward, bonus = np.zeros_like(data.reward), np.array([float(name.split("bonus")[1].split("-")[0]) for name in data.catalogue.ids])
    reward[:, 0] = (bonus[data.item] == 10) * 1.0  # ten rupees are best for everybody
    lesson = benchmark.lessons(platform, dataclasses.replace(data, reward=reward))
    chosen = benchmark.boosting(lesson, "boosting-now", seed=0)(data.states(np.arange(40)))
    assert set(chosen) <= set(data.catalogue.ids)
    assert (bonus[data.catalogue.positions(list(chosen))] == 10).mean() > 0.9


def test_the_published_form_takes_as_many_steps_as_the_rivals(log):
    platform, data = log
    learning = int(0.85 * len(benchmark.lessons(platform, data).row))
    batches = max(learning // 1024, 1)
    assert benchmark.published_epochs(platform, data, 20 * 7 * batches) == 7
    assert benchmark.published_epochs(platform, data, 10**9) == 100, "never more than were published"
    choose = benchmark.learn("paper", platform, data, 0, 20 * batches)
    action = choose(data.states(np.arange(10)))
    low, high = platform.bounds.T
    assert ((action >= low) & (action <= high)).all()


class TestFigures:
    def test_students_interval_by_hand(self):
        mean, low, high = benchmark.t_interval(np.array([1.0, 2.0, 3.0]))
        assert mean == 2.0
        # t_{0.975, 2} = 4.302653; standard error 1 / sqrt(3)
        assert low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)
        assert high == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-6)
        assert benchmark.t_interval(np.array([1.0])) == (1.0, None, None)

    def test_way_and_lead_and_headline_are_paired_by_seed(self):
        world = worlds.world()

        def cell(value, returns):
            return {"value": value, "objectives": dict.fromkeys(worlds.OBJECTIVES, 1.0) | {"returns": returns}, "seconds": 2.0}

        others = {name: cell(0.5, 1.0) for name in world.policies}
        found = {
            0: others | {"mixture": cell(1.0, 1.0), "best-known": cell(2.0, 1.0), "fastq": cell(1.8, 1.1), "bc": cell(1.1, 1.0)},
            1: others | {"mixture": cell(3.0, 1.0), "best-known": cell(4.0, 1.0), "fastq": cell(3.8, 1.3), "bc": cell(3.1, 1.0)},
        }
        table = benchmark.table(world, ("fastq", "bc"), found)
        rows = {row["method"]: row for row in table["rows"]}
        assert rows["fastq"]["way"] == pytest.approx(0.8)
        assert rows["bc"]["lead"] == pytest.approx(0.7)
        assert rows["bc"]["lead_high"] - rows["bc"]["lead_low"] == pytest.approx(0, abs=1e-12)  # though the seeds themselves lie far apart
        assert rows["bc"]["high"] - rows["bc"]["low"] > 1
        assert rows["mixture"]["seconds"] is None
        assert [row["value"] for row in table["rows"]] == sorted((row["value"] for row in table["rows"]), reverse=True)
        assert table["headline"]["against"] == "bc"
        assert table["headline"]["changes"]["returns"]["percent"] == pytest.approx(20)


class TestAsking:
    def test_fastq_is_always_there_and_an_unknown_method_is_named(self):
        assert benchmark.checked_methods(["boosting-now"])[0] == ("fastq", "boosting-now")
        with pytest.raises(RequestError, match="'dqn' is no method of the benchmark; expected some of fastq"):
            benchmark.checked_methods(["dqn"])

    def test_what_is_not_installed_is_left_out_and_said(self, monkeypatch):
        monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
        methods, notes = benchmark.checked_methods(benchmark.METHODS)
        assert methods == ("fastq", "paper", *benchmark.BOOSTING)
        assert "pip install 'fastq[rivals]'" in notes[0]

    def test_an_unknown_world_ends_with_2(self, fastq, tmp_path):
        said = fastq("benchmark", "--world", "mars", cwd=tmp_path, code=2).stderr
        assert "'mars' is no simulated platform; expected one of arena" in said

    def test_without_logs_and_without_a_world_there_is_nothing_to_compare(self, fastq, tmp_path):
        assert "name a simulated platform with --world" in fastq("benchmark", cwd=tmp_path, code=2).stderr
