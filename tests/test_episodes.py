"""Minari data sets become logs: written by the real library, read, trained on, recommended from; one policy is enough."""

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

minari = pytest.importorskip("minari")
from gymnasium import spaces  # noqa: E402 - comes with minari
from minari.data_collector.episode_buffer import EpisodeBuffer  # noqa: E402

from fastq import episodes, features, learner, load_platform, records, windows  # noqa: E402
from fastq.errors import ConfigurationError, LogsError  # noqa: E402

STEPS = 8
BOX = spaces.Box(-1.0, 1.0, (1,), np.float32)
SEEN = spaces.Dict({"place": spaces.Box(-np.inf, np.inf, (2,), np.float32), "mode": spaces.Discrete(2)})


def write(directory, name="corridor/noisy-v0", count=120, seed=0, space=BOX, shift=0.3, seen=SEEN):
    """A data set in Minari's own format. The reward is best where the action is half of what is seen first; the policy aims `shift` beside it, with noise.

    Every other episode terminates; the rest are truncated.
    """
    rng = np.random.default_rng(seed)
    buffers = []
    for k in range(count):
        place = rng.normal(0, 0.8, (STEPS + 1, 2))
        aim = 0.5 * place[:-1, 0]
        action = np.clip(aim + shift + rng.normal(0, 0.3, STEPS), -1, 1)
        rewards = 1 - (action - aim) ** 2 * 4 + rng.normal(0, 0.05, STEPS)
        acted = action[:, None].astype(np.float32) if space is BOX else rng.integers(space.start, space.start + space.n, STEPS)
        ends = np.arange(STEPS) == STEPS - 1
        observed = {"place": place.astype(np.float32), "mode": np.full(STEPS + 1, k % 2)} if seen is SEEN else np.zeros((STEPS + 1, *seen.shape), seen.dtype)
        buffers.append(
            EpisodeBuffer(
                id=k, observations=observed, actions=acted, rewards=list(rewards), terminations=list(ends & (k % 2 == 0)), truncations=list(ends & (k % 2 == 1))
            )
        )
    return minari.create_dataset_from_buffers(
        name, buffers, action_space=space, observation_space=seen, data_format="hdf5", algorithm_name="noisy", author="a test", author_email="a@test.example",
        code_permalink="https://test.example", description="made by a test",
    )  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where Minari keeps its data sets, for this test alone."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path


def built(root):
    platform = load_platform(root)
    read = records.read_records(platform)
    assert len(read.quarantine) == 0
    return platform, windows.build(platform, read, features.build_rows(platform, read))


def test_every_step_is_a_decision_with_what_was_seen_and_what_it_brought(place):
    dataset = write(place, count=12)
    document = episodes.import_minari(["corridor/noisy-v0"], place / "shop", window=3, discount=0.9)
    assert (document["episodes"], document["steps"], document["terminated"]) == (12, 12 * STEPS, 6)
    assert (place / "datasets/corridor/noisy-v0/data/main_data.hdf5").is_file(), "the format that is meant"
    platform, data = built(place / "shop")
    assert data.policies == platform.policies == ["noisy"]
    for k, episode in enumerate(dataset.iterate_episodes()):
        rows = np.flatnonzero(np.array([data.player_ids[p] for p in data.player]) == f"noisy/{k}")
        np.testing.assert_allclose(data.action[rows], episode.actions, rtol=1e-6)
        np.testing.assert_allclose(data.reward[rows, 0], episode.rewards, rtol=1e-6)
        newest = data.raw(rows)[:, -1]
        expected = episode.observations["place"][:-1]
        names = list(platform.state.measures)
        np.testing.assert_allclose(newest[:, [names.index("o_place_0"), names.index("o_place_1")]], expected, rtol=1e-6)
        np.testing.assert_allclose(newest[:, names.index(f"o_mode_{k % 2}")], 1)
        before = data.raw(rows[1:])[:, -2]
        np.testing.assert_allclose(before[:, -1], episode.rewards[:-1], rtol=1e-5), "the reward of the step before is known"
        np.testing.assert_allclose(before[:, -2:-1], episode.actions[:-1], rtol=1e-5)
        # how it ended
        assert data.terminated[rows[-1]] == (k % 2 == 0)
        assert data.truncated[rows[-1]] == (k % 2 == 1)
        assert not data.terminated[rows[:-1]].any()
        np.testing.assert_allclose(data.discount[rows[:-1], 0], 0.9)
        assert data.discount[rows[-1], 0] == 0


def test_where_nothing_was_truncated_one_episode_is_taken_for_the_log_s_end():
    def lived(steps, terminated):
        return episodes.Episode("e", np.zeros((steps, 1)), np.zeros((steps, 1)), np.zeros(steps), terminated)

    days = episodes.days_of([lived(3, True), lived(5, True), lived(2, True)])
    assert [day + steps for day, steps in zip(days, (3, 5, 2), strict=True)] == [days[2] - 1, days[2] - 1, days[2] + 2]


def test_discrete_actions_are_items_and_several_data_sets_are_several_policies(place):
    space = spaces.Discrete(4, start=2)
    write(place, "corridor/first-v0", count=6, space=space)
    write(place, "corridor/second-v1", count=6, seed=1, space=space)
    document = episodes.import_minari(["corridor/first-v0", str(place / "datasets/corridor/second-v1")], place / "shop", window=2, discount=0.9)
    assert document["policies"] == ["first", "second"]
    assert document["action"] == ["item_id"]
    _, data = built(place / "shop")
    assert len(data) == 2 * 6 * STEPS
    assert data.catalogue.ids == ["2", "3", "4", "5"]
    assert (data.item >= 0).all()


def test_one_policy_goes_the_whole_way_as_the_readme_has_it(place, fastq):
    """import, retrain (train, evaluate, gate), recommend, explain, by the README's commands; and what is learned is better than what was logged."""
    write(place, count=500)  # the gate asks for 100 effective players among the held-out ones
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## One policy is enough\n.*?```console\n(.*?)```", readme, re.DOTALL)[1]
    told = {}
    for line in block.strip().splitlines():
        program, command, *arguments = line.split()
        assert program == ".venv/bin/fastq"
        more = ["--window", "2", "--discount", "0"] if command == "import" else []  # the reward of this corridor depends on nothing before
        told[command] = json.loads(fastq(command, *arguments, *more, "--json", cwd=place, code=0).stdout)
    root, made = place / "corridor", told["retrain"]
    assert told["import"]["policies"] == ["noisy"]
    assert made["promoted"], made["reasons"]
    found = told["recommend"]["recommendations"]
    assert [r["policy"] for r in found] == ["fastq"] * 2
    why = told["explain"]
    assert sum(part["value"] for part in why["parts"]) == pytest.approx(why["value"], rel=1e-5)
    assert why["contrast"]["against"] == "noisy"
    estimates = json.loads(fastq("evaluate", "1", "--json", cwd=root, code=(0, 1)).stdout)["estimates"]
    assert {row["policy"] for row in estimates} == {"fastq", "noisy"}
    assert all(None not in (row["value"], row["low"], row["high"]) for row in estimates)

    from fastq import load_policy

    platform, data = built(root)
    policy = load_policy("models:/" + platform.platform + "@champion", root)
    index = np.arange(0, len(data), 5)
    states = data.states(index)
    best = policy.recommend(states, explore=False).action[:, 0]
    aim = 0.5 * states.history[:, -1, list(platform.state.measures).index("o_place_0")]
    logged = np.abs(data.action[index, 0] - aim).mean()
    assert np.abs(best - aim).mean() < 0.5 * logged, (np.abs(best - aim).mean(), logged)


def test_gradients_reach_the_representation_with_one_policy(place):
    """The published single-policy code trains none of it: a softmax over one class has no gradient. Here the experts and the outcomes give it theirs."""
    import torch

    from fastq import equations
    from fastq.features import Units
    from fastq.networks import Representation
    from fastq.representation import RepresentationModule, train_representation

    write(place, count=40)
    episodes.import_minari(["corridor/noisy-v0"], place / "shop", window=2, discount=0)
    _, data = built(place / "shop")
    encoding = features.fit_encoding(data.platform, data.matrix, data.attributes)
    units, rows = Units.of(data.action, catalogue=False), np.arange(len(data))
    network, states, history = train_representation(data, encoding, units, rows, rows)
    assert history[-1]["experts"] < 0.9 * history[0]["experts"], "it learns"
    fresh = Representation(network.sizes)
    torch.nn.init.normal_(fresh.effects, std=0.1)
    phi = equations.action_features(torch.from_numpy(units.standard(data.action)).float(), True)
    targets = {"policy": torch.from_numpy(data.policy), "features": phi, "proposed": phi[:, None].clone(), "outcomes": torch.randn(len(data), 2)}
    module = RepresentationModule(fresh, states, targets, torch.arange(10), seed=0, epochs=2, learning_rate=1e-3, balance=0.1)
    module.epochs_done = 1
    module.training_step(torch.arange(128)).backward()
    dead = {name for name, p in fresh.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0}
    # whom there is one of needs no telling apart; the encoder has no attributes to embed here
    assert {name for name in dead if name.startswith(("encoder.", "experts.", "balance."))} <= {"encoder.attributes.weight"}
    assert all(name.startswith(("adversary.", "assignment.", "encoder.attributes.weight")) for name in dead), dead
    balance = learner.train(data.platform, data).details["balance"]
    assert balance["probe"] == balance["chance"] == 1.0


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ("nothing", LogsError, "minari download nothing-v0"),
        ("picture", ConfigurationError, "is a picture"),
        ("other", ConfigurationError, "import them apart"),
        ("there", ConfigurationError, "is already there"),
        ("damaged", LogsError, "cannot be read as a Minari data set"),
    ],
)
def test_what_cannot_be_imported_is_said(place, what, error, says):
    names = ["nothing-v0"] if what == "nothing" else ["corridor/noisy-v0"]
    if what != "nothing":
        write(place, count=2, seen=spaces.Box(0, 1, (64, 64), np.float32) if what == "picture" else SEEN)
    if what == "other":
        write(place, "corridor/discrete-v0", count=2, space=spaces.Discrete(2))
        names.append("corridor/discrete-v0")
    if what == "there":
        (place / "shop").mkdir()
        (place / "shop/fastq.yaml").write_text("")
    if what == "damaged":
        (place / "datasets/corridor/noisy-v0/data/main_data.hdf5").write_bytes(b"no HDF5")
        names = [str(place / "datasets/corridor/noisy-v0")]
    with pytest.raises(error, match=says):
        episodes.import_minari(names, place / "shop", window=2, discount=0.9)
    assert not (place / "shop/logs").exists()


def test_policies_are_named_after_the_data_sets():
    assert episodes.policy_names(["a/medium-v0", "a/expert-v2"]) == ["medium", "expert"]
    assert episodes.policy_names(["a/medium-v0", "b/medium-v0"]) == ["a/medium-v0", "b/medium-v0"]
    assert episodes.policy_names(["fastq-v1"]) == ["fastq-data"]
    with pytest.raises(ConfigurationError, match="once"):
        episodes.policy_names(["a/medium-v0", "a/medium-v0"])


def test_dimensions_without_bounds_have_those_of_what_was_done():
    tree, names = episodes.action_tree(spaces.Box(np.array([-np.inf, 0]), np.array([np.inf, 2])), np.array([[-3.0, 1], [4.0, 2.0]]))
    assert names == ["a0", "a1"]
    assert tree["dimensions"] == {"a0": {"low": -3.0, "high": 4.0}, "a1": {"low": 0.0, "high": 2.0}}
    stepped, _ = episodes.action_tree(spaces.MultiDiscrete([3, 5]), np.array([[0, 0], [2, 4]]))
    assert stepped["dimensions"]["a1"] == {"low": 0.0, "high": 4.0, "step": 1.0}
    with pytest.raises(ConfigurationError, match="one value only"):
        episodes.action_tree(spaces.MultiDiscrete([1]), np.array([[0], [0]]))
    assert pl.DataFrame(episodes.flat(spaces.Discrete(3, start=1), np.array([1, 3]), 2)).rows() == [(1, 0, 0), (0, 0, 1)]
