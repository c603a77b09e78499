"""Learning: gradients reach what is trained and nothing else, a stopped run ends where it would have, a known best action is found."""

import copy
import dataclasses
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from fastq import equations, features, learner, windows
from fastq.errors import TrainingError
from fastq.features import Units
from fastq.networks import Actor, Representation, Represented, Values
from fastq.platform import platform_from_tree
from fastq.policy import REACH
from fastq.records import Counts, Records
from fastq.representation import RepresentationModule, StateTensors, device_of, represent, train_representation


def bandit(players=400, days=12, seed=0, policies=("low", "high"), epochs=3):
    """A platform whose best action is known: `gain` peaks at 6 for calm players and at 9 for the others; `cost` is the action's size.

    Both behaviour policies act with noise around 4 and 11, whoever the player.
    """
    rng = np.random.default_rng(seed)
    n = players * days
    player, day = np.repeat(np.arange(players), days), np.tile(np.arange(days), players)
    calm = (np.arange(players) % 2 == 0)[player]
    which = rng.integers(0, len(policies), n)
    action = np.clip(np.array([4.0, 11.0])[which] + rng.normal(0, 2, n), 0, 15)
    gain = -(((action - np.where(calm, 6.0, 9.0)) / 4) ** 2) + rng.normal(0, 0.3, n)
    start = datetime(2026, 1, 1, 6, tzinfo=UTC)
    ids = [f"p{i:04d}" for i in range(players)]
    decisions = pl.DataFrame(
        {
            "decision_id": [f"d{i}" for i in range(n)],
            "player_id": [ids[i] for i in player],
            "decided_at": [start + timedelta(days=int(d)) for d in day],
            "policy": [policies[k] for k in which],
            "propensity": np.full(n, 0.1),
            "assignment": np.full(n, 1 / len(policies)),
            "model_version": pl.Series([None] * n, dtype=pl.String),
            "size": action,
            "gain": gain,
            "cost": action / 15 + rng.normal(0, 0.05, n),
        }
    )
    attributes = pl.DataFrame(
        {
            "player_id": ids,
            "valid_from": pl.Series([None] * players, dtype=pl.Datetime("us", "UTC")),
            "calm": ["yes" if i % 2 == 0 else "no" for i in range(players)],
        }
    )
    tree = {
        "platform": "bandit",
        "logs": {"decisions": "d.parquet", "players": "p.parquet"},
        "state": {"window": 4, "attributes": {"calm": {"kind": "categorical"}}},
        "policies": list(policies),
        "action": {"kind": "continuous", "dimensions": {"size": {"low": 0, "high": 15}}},
        "objectives": {"gain": {"weight": 1.0, "discount": 0}, "cost": {"weight": -0.1, "discount": 0}},
        "training": {"epochs": epochs, "batch_size": 256},
    }
    from pathlib import Path

    platform = platform_from_tree(tree, Path(), "test")
    read = Records(decisions, None, attributes, None, None, pl.DataFrame(), {"decisions": Counts(n, 0, 0)}, {}, [])
    return platform, windows.build(platform, read, features.build_rows(platform, read))


@pytest.fixture(scope="module")
def learned():
    torch.set_num_threads(1)
    platform, data = bandit(epochs=15)
    return data, learner.train(platform, data)


def finds_the_best_action(data, policy):
    """Of a bandit's policy: for each kind of player."""
    index = np.flatnonzero(np.arange(len(data)) % 12 == 11)
    best = policy.recommend(data.states(index), explore=False).action[:, 0]
    calm = np.array([value == "yes" for value in data.attributes[index]["calm"]])
    # the optimum under weights 1 and -0.1: 6 or 9, less 0.1 / 15 * 16 / 2 = 0.05 games for the cost
    assert best[calm].mean() == pytest.approx(5.95, abs=0.6)
    assert best[~calm].mean() == pytest.approx(8.95, abs=0.6)


def test_the_known_best_action_is_found_for_each_kind_of_player(learned):
    finds_the_best_action(*learned)


def test_unseen_players_confirm_what_is_there_and_the_report_says_so(learned):
    _, policy = learned
    assert policy.details["confirmed"]["gain"]["value"] == pytest.approx(1, abs=0.15)
    assert policy.details["confirmed"]["gain"]["gain"] > 0.3


def test_values_are_those_of_the_immediate_objective_where_nothing_follows(learned):
    data, policy = learned
    enc = policy.encode(data.states(np.arange(500)))
    parts = policy.parts(enc, data.action[:500, None])[:, 0]
    assert np.corrcoef(parts.sum(-1)[:, 0], data.reward[:500, 0])[0, 1] > 0.8
    assert np.abs(parts[:, :, 1]).mean() < 0.1 * np.abs(parts[:, :, 0]).mean(), "no long term without a discount"


def test_what_a_training_is_judged_by_is_told_with_it(learned):
    data, policy = learned
    told = policy.details["diagnostics"]
    assert told["compared_horizon"] == 1, "without a discount nothing is left after one decision"
    held_out = windows.held_out_players(data.player_ids, 0.3, 0)[data.player]
    checked = windows.held_out_players(data.player_ids, 0.15, 1)[data.player] & ~held_out
    assert told["compared_decisions"] == checked.sum()
    for j, name in enumerate(("gain", "cost")):
        assert told[f"returned/{name}"] == pytest.approx(data.reward[checked, j].mean())
        assert told[f"value/{name}"] == pytest.approx(told[f"returned/{name}"], abs=0.1)
        assert told[f"correlation/{name}"] > 0.8
    assert told["at_bounds/size"] < 0.05, "the optimum, 6 or 9, is far from 0 and 15"
    assert 0 <= told["twin_disagreement"] < 0.5
    assert {"td_error", "bound", "level", "twin_disagreement", "at_edge"} == set(policy.details["history"]["value_and_actor"][-1])


def test_a_matrix_in_a_mapped_file_is_learned_from_where_it_lies_and_teaches_the_same(tmp_path):
    torch.set_num_threads(1)
    platform, data = bandit(players=60, days=6, epochs=1)
    mapped = np.memmap(tmp_path / "matrix", np.float32, "w+", shape=data.matrix.shape)
    mapped[:] = data.matrix
    there = dataclasses.replace(data, matrix=mapped)
    encoding = features.fit_encoding(platform, data.matrix, data.attributes)
    states = StateTensors.of(there, encoding, torch.device("cpu"))
    assert states.raw.data_ptr() == mapped.ctypes.data, "not a copy"
    x, _, _ = states.gather(torch.arange(100))
    np.testing.assert_array_equal(x.numpy(), encoding.rows(data.raw(np.arange(100))))  # what serving would make of the same windows
    in_memory, in_file = learner.train(platform, data), learner.train(platform, there)
    np.testing.assert_array_equal(in_memory.effects, in_file.effects)
    for expected, found in zip(in_memory.actor.state_dict().values(), in_file.actor.state_dict().values(), strict=True):
        assert torch.equal(expected, found)
    np.testing.assert_array_equal(mapped, data.matrix)  # read, never written


def test_gradients_reach_every_trained_parameter_of_stage_1_and_its_update_changes_it():
    torch.set_num_threads(1)
    platform, data = bandit(players=60, days=6)
    rows = np.arange(len(data))
    encoding = features.fit_encoding(platform, data.matrix, data.attributes)
    network, states, _ = train_representation(data, encoding, Units.of(data.action, catalogue=False), rows, rows)
    assert not any(p.requires_grad for p in network.parameters()), "stage 1 is frozen when it is done"
    fresh = Representation(network.sizes)
    torch.nn.init.normal_(fresh.effects, std=0.1)
    phi = equations.action_features(torch.from_numpy(Units.of(data.action, catalogue=False).standard(data.action)).float(), True)
    targets = {
        "policy": torch.from_numpy(data.policy),
        "features": phi,
        "proposed": phi[:, None].expand(-1, 2, -1).clone(),
        "outcomes": torch.randn(len(data), 4),
    }
    module = RepresentationModule(fresh, states, targets, torch.arange(10), seed=0, epochs=2, learning_rate=1e-3, balance=0.1)
    module.epochs_done = 1  # the reversal's strength is 0 in the very first epoch
    module.training_step(torch.arange(256)).backward()
    dead = [name for name, p in fresh.named_parameters() if p.requires_grad and (p.grad is None or float(p.grad.abs().max()) == 0)]
    assert not dead, dead


def test_the_reversed_gradient_moves_the_state_against_the_adversary_and_the_adversary_with_it():
    platform, data = bandit(players=40, days=4)
    encoding = features.fit_encoding(platform, data.matrix, data.attributes)
    network, states, _ = train_representation(data, encoding, Units.of(data.action, catalogue=False), np.arange(len(data)), np.arange(len(data)))
    network = copy.deepcopy(network).requires_grad_(True)
    index, policy = torch.arange(128), torch.from_numpy(data.policy[:128])

    def gradients(lam):
        network.zero_grad()
        seen = network(*states.gather(index))
        torch.nn.functional.cross_entropy(network.adversary(equations.reverse_gradient(seen.b, lam)), policy).backward()
        return network.balance[0].weight.grad.clone(), network.adversary.layers[0].weight.grad.clone()

    (state, adversary), (other_state, other_adversary) = gradients(0.1), gradients(-1.0)
    torch.testing.assert_close(state, -0.1 * other_state)
    torch.testing.assert_close(adversary, other_adversary)


def test_stage_2_trains_values_and_actor_and_nothing_else(learned, monkeypatch):
    data, _ = learned
    seen = {}
    step = learner.ValueAndActor.training_step

    def watched(module, index):
        step(module, index)
        seen.setdefault("dead", [name for name, p in module.named_parameters() if p.requires_grad and (p.grad is None or float(p.grad.abs().max()) == 0)])
        seen.setdefault("frozen", [name for name, p in module.named_parameters() if not p.requires_grad])

    monkeypatch.setattr(learner.ValueAndActor, "training_step", watched)
    learner.train(data.platform.model_copy(update={"training": data.platform.training.model_copy(update={"epochs": 1})}), data)
    assert seen["dead"] == []
    assert seen["frozen"] and all(name.startswith("target.") for name in seen["frozen"])
    assert isinstance(learned[1].values, Values) and isinstance(learned[1].actor, Actor)


@pytest.mark.parametrize("stop_in", ["representation", "value and actor"])
def test_killed_and_resumed_equals_never_stopped_bit_for_bit(tmp_path, stop_in, trained_whole_and_resumed):
    torch.set_num_threads(1)
    platform, data = bandit(players=80, days=6, epochs=4)

    whole, resumed = trained_whole_and_resumed(platform, data, tmp_path, stop_in, 2)
    np.testing.assert_array_equal(whole.effects, resumed.effects)
    assert {p.suffix for p in (tmp_path / "cut").iterdir()} == {".safetensors"}, "the record is safetensors, no checkpoint of another kind"


def test_cuda_where_there_is_none_is_refused_by_name_and_auto_does_without(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    platform, data = bandit(players=40, days=4)
    asked = platform.training.model_copy(update={"accelerator": "cuda"})
    with pytest.raises(TrainingError, match=r"training\.accelerator: cuda: PyTorch finds no CUDA device here; expected cpu or auto"):
        learner.train(platform.model_copy(update={"training": asked}), dataclasses.replace(data, platform=platform.model_copy(update={"training": asked})))
    assert device_of(platform.training).type == "cpu"


def test_a_device_that_is_too_small_is_named(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    platform, data = bandit(players=40, days=4)
    monkeypatch.setattr(learner, "fit", full)
    with pytest.raises(TrainingError, match=r"too little memory for 160 decisions; set training\.accelerator: cpu and train anew"):
        learner.train(platform, data)


def test_a_log_with_one_policy_trains():
    platform, data = bandit(players=60, days=6, policies=("low",), epochs=2)
    policy = learner.train(platform, data)
    assert policy.policies == ["low"]
    assert np.isfinite(policy.recommend(data.states(np.arange(20))).value).all()


def test_a_loss_that_diverges_stops_the_run_with_a_sentence():
    platform, data = bandit(players=40, days=4)
    hasty = platform.model_copy(update={"training": platform.training.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(TrainingError, match=r"stage 1 diverged in epoch 1: .*; lower training.learning_rate"):
        learner.train(hasty, dataclasses.replace(data, platform=hasty))


@pytest.mark.parametrize("players", [1, 2])
def test_too_few_players_are_refused_in_words(players):
    platform, data = bandit(players=players, days=1)
    with pytest.raises(TrainingError, match=r"too few|nothing to learn"):
        learner.train(platform, data)


def test_a_log_without_any_outcome_is_refused_in_words():
    platform, data = bandit(players=40, days=3)
    data.reward[:] = np.nan
    with pytest.raises(TrainingError, match="no objective of any decision is known yet"):
        learner.train(platform, data)


def test_an_objective_without_action_dependent_signal_gets_no_effect_but_keeps_its_doubt():
    platform, data = bandit(players=200, days=8, epochs=4)
    data.reward[:, 1] = np.random.default_rng(7).normal(size=len(data))  # of one in eight such objectives something is believed: the test below
    policy = learner.train(platform, data)
    index = np.arange(200)
    enc = policy.encode(data.states(index))
    parts = policy.parts(enc, np.stack([np.full((200, 1), 4.0), np.full((200, 1), 11.0)], 1)).sum(-1)
    np.testing.assert_allclose(parts[:, 0, 1], parts[:, 1, 1], rtol=0, atol=1e-12)
    assert policy.doubt(enc, np.full((200, 1, 1), 4.0), np.full((200, 1, 1), 11.0), weights={"gain": 0, "cost": 1}).min() > 0.01


def test_noise_is_seldom_believed_and_what_bends_or_depends_on_the_state_is_found():
    rng, n, s, p, d = np.random.default_rng(0), 4_000, 7, 9, 3
    psi, u = np.concatenate([np.ones((n, 1)), np.tanh(rng.normal(size=(n, s - 1)))], 1), rng.normal(size=(n, d))
    design = equations.orthogonal_design(psi, np.concatenate([u, u**2 - 1, (u**3 - 3 * u) / 2], 1))
    fold, noise = rng.integers(0, learner.FOLDS, n), rng.normal(size=(n, 40))
    priors = learner.prior_scales(s, p, d)
    assert len(priors) == 12 and len(learner.prior_scales(s, p, p)) == 4, "items' features do not bend"
    effects, slope, gain = learner.confirmed_effects(design, noise, fold, priors)
    believed = (effects != 0).any(1)
    assert believed.sum() <= 10, "chance alone"
    assert ((slope > 0) == believed).all() and ((gain > 0) == believed).all()
    truth = np.zeros((2, s * p))
    truth[0, p + 1], truth[1, 4] = 0.3, -0.2  # of the second dimension, where the first modifier says so; of the second one's square
    found, slope, gain = learner.confirmed_effects(design, design @ truth.T + noise[:, :2], fold, priors)
    # the two columns' own variances are 0.39 and 2: what they explain is 0.3^2 * 0.39 and 0.2^2 * 2 of what there is
    np.testing.assert_allclose(gain, [0.035 / 1.035, 0.08 / 1.08], atol=0.015)
    assert np.linalg.norm(found - truth, axis=1).max() < 0.13 and slope.min() > 0.8


def found_between_policies(noise, logged, sticks="decision", seed=0):
    """What the critic finds that 7 more of `size` bring, truly 1.4, where players' mood decides who acts and what is gained, and no log holds it.

    noise: the policies' own; logged [N, 2] -> [N, K]: the probabilities that the log tells, of the true ones; and perhaps of policies that never act.
    """
    platform, data = bandit()
    rng = np.random.default_rng(seed)
    n, mood = len(data), rng.integers(0, 2, len(data))
    chance = np.where(mood[:, None] == 1, [0.2, 0.8], [0.8, 0.2])
    which = (rng.random(n) > chance[:, 0]).astype(int)
    size = np.array([4.0, 11.0])[which] + noise * rng.standard_normal(n)
    gain = 0.2 * size + 3.0 * mood + rng.normal(0, 0.3, n)
    platform, told = platform.model_copy(update={"assignment": sticks}), logged(chance)
    data = dataclasses.replace(
        data, platform=platform, policy=which, action=size[:, None], reward=np.stack([gain, data.reward[:, 1]], 1), chance=told, proposals=None,
        policies=["low", "high", "later"][: told.shape[1]],
    )  # fmt: skip
    units = Units.of(data.action, False)
    phi = equations.action_features(torch.from_numpy(units.standard(data.action)), True)
    expected = torch.stack([phi[which == k].mean(0) if (which == k).any() else phi.mean(0) for k in range(told.shape[1])]).expand(n, told.shape[1], -1)
    seen = Represented(torch.from_numpy(rng.standard_normal((n, 3))), torch.ones(n, 1), expected, torch.zeros(n, told.shape[1]))
    effects = learner.orthogonal_critic(data, seen, phi.numpy(), np.zeros((n, 0)), np.arange(n), seed).effects
    low, high = (equations.action_features(torch.from_numpy(units.standard(np.array([[x]]))), True).numpy()[0] for x in (4.0, 11.0))
    return effects[0, 0, 0] @ (high - low)


class TestWhatWasLeftToChance:
    """`orthogonal_critic` compares policies with each other where the log tells how likely each was to act, and only there."""

    def test_a_hidden_cause_of_who_acts_misleads_no_one(self):
        nothing = np.full_like
        assert found_between_policies(2.0, lambda chance: nothing(chance, np.nan)) == pytest.approx(1.4, abs=0.3), "each policy's own noise suffices"
        assert found_between_policies(2.0, lambda chance: chance) == pytest.approx(1.4, abs=0.15)
        assert found_between_policies(2.0, lambda chance: nothing(chance, 0.5)) > 2, "what would be believed if the platform had not said how it chose"

    def test_policies_without_noise_teach_by_how_they_differ(self):
        assert found_between_policies(0.0, lambda chance: chance) == pytest.approx(1.4, abs=0.15)
        assert found_between_policies(0.0, lambda chance: np.full_like(chance, np.nan)) == pytest.approx(0, abs=1e-6)

    def test_a_choice_that_sticks_to_a_player_says_nothing_of_later_states(self):
        assert found_between_policies(0.0, lambda chance: chance, sticks="player") == pytest.approx(0, abs=1e-6)

    def test_a_policy_that_is_served_only_later_ends_no_comparison(self):
        """As after fastq's own first decisions: nobody had a chance to give it before."""
        later = found_between_policies(0.0, lambda chance: np.column_stack([chance, np.full(len(chance), np.nan)]))
        assert later == pytest.approx(1.4, abs=0.15)

    @pytest.mark.parametrize(
        ("logged", "told", "compared"),
        [
            ([0.2, 0.8, np.nan], [0.2, 0.8, 0.0], True),
            ([0.168, 0.168, 0.666], [0.168 / 1.002, 0.168 / 1.002, 0.666 / 1.002], True),  # as platforms round
            ([0.2, 0.7, np.nan], [0.25, 0.25, 0.5], False),  # a tenth of the time somebody else acts: what stage 1 found
            ([np.nan, 1.0, np.nan], [0.25, 0.25, 0.5], False),  # nothing was left to chance
            ([np.nan, np.nan, np.nan], [0.25, 0.25, 0.5], False),
        ],
    )
    def test_chances_count_where_all_of_more_than_one_policy_are_told(self, logged, told, compared):
        platform, data = bandit(players=4, days=1)
        data = dataclasses.replace(data, platform=platform, chance=np.array([logged]))
        seen = Represented(torch.zeros(1, 3), torch.ones(1, 1), torch.zeros(1, 3, 2), torch.tensor([[0.25, 0.25, 0.5]]).log())
        chance, whether = learner.chance_to_act(data, seen, np.arange(1))
        np.testing.assert_allclose(chance, [told], rtol=1e-6)
        assert whether.tolist() == [compared]


@pytest.fixture(scope="module")
def types():
    """Players of two kinds, of whom one brings 5 more every day, whatever is done; `state` lasts, 0.8 of it a day, and is worth its size. Kinds
    differ in it too. What follows a state is therefore worth `1 / (1 - 0.9 * 0.8)` of it. The action adds to tomorrow's state and brings nothing today.
    """
    players, days = 300, 60  # of so many decisions the within estimator's bias is a sixtieth
    platform, data = bandit(players, days)
    rng = np.random.default_rng(3)
    kind = np.repeat(rng.integers(0, 2, players), days)
    state, action = np.zeros(len(data)), np.clip(np.array([4.0, 11.0])[data.policy] + rng.normal(0, 2, len(data)), 0, 15)
    for i in range(len(data)):
        before = state[i - 1] + 0.05 * (action[i - 1] - 7.5) if i % days else 0.0
        state[i] = 0.8 * before + rng.normal(0, 0.3)
    state += 1.0 * kind
    gain = state + 5 * kind + rng.normal(0, 0.3, len(data))
    objectives = {name: o.model_copy(update={"discount": 0.9}) if name == "gain" else o for name, o in platform.objectives.items()}
    platform = platform.model_copy(update={"objectives": objectives})
    reward = np.stack([gain, data.reward[:, 1]], 1)
    return dataclasses.replace(data, platform=platform, action=action[:, None], reward=reward, chance=np.full((len(data), 2), 0.5), proposals=None), state


class TestStillToCome:
    """What a state is worth is how a player's own ups and downs go on, not how players differ."""

    def test_what_a_player_always_brings_is_not_credited_to_the_state(self, types):
        data, state = types
        rows = np.arange(len(data))
        fold = learner.player_folds(data.player, 0)
        value = learner.still_to_come(data, state[:, None], rows, fold)
        slope = np.polyfit(state, value[:, 0], 1)[0]
        assert slope == pytest.approx(1 / (1 - 0.9 * 0.8), rel=0.15)
        assert (value[:, 1] == 0).all(), "of what counts today alone nothing is still to come"

    def test_a_player_promises_nothing_to_itself(self, types):
        """A fold's values come from other folds: whatever its own players brought."""
        data, state = types
        rows, fold = np.arange(len(data)), learner.player_folds(data.player, 0)
        changed = dataclasses.replace(data, reward=np.where((fold == 2)[:, None], 100.0 * state[:, None], data.reward))
        before, after = (learner.still_to_come(d, state[:, None], rows, fold)[:, 0] for d in (data, changed))
        np.testing.assert_allclose(after[fold == 2], before[fold == 2], rtol=1e-9, atol=1e-9)
        assert np.abs(after - before)[fold != 2].max() > 1

    def test_rows_may_be_any_players_in_any_order(self, types):
        data, state = types
        rows = np.flatnonzero(data.player % 3 > 0)[::-1]
        fold = learner.player_folds(data.player[rows], 0)
        value = learner.still_to_come(data, state[rows, None], rows, fold)
        assert np.polyfit(state[rows], value[:, 0], 1)[0] == pytest.approx(1 / (1 - 0.9 * 0.8), rel=0.15)

    def test_an_action_is_credited_with_the_state_it_leads_to(self, types):
        """0.05 more of tomorrow's state for each unit, 0.8 of it there tomorrow: 0.9 * 0.04 / (1 - 0.72) in all, nothing of it today."""
        data, state = types
        n, units = len(data), Units.of(data.action, False)
        phi = equations.action_features(torch.from_numpy(units.standard(data.action)), True)
        expected = torch.stack([phi[data.policy == k].mean(0) for k in range(2)]).expand(n, 2, -1)
        seen = Represented(torch.from_numpy(state[:, None]), torch.ones(n, 1), expected, torch.zeros(n, 2))
        effects = learner.orthogonal_critic(data, seen, phi.numpy(), state[:, None], np.arange(n), 0).effects
        low, high = (equations.action_features(torch.from_numpy(units.standard(np.array([[x]]))), True).numpy()[0] for x in (4.0, 11.0))
        assert effects[0, 0, 0] @ (high - low) == pytest.approx(7 * 0.9 * 0.04 / (1 - 0.72), rel=0.2)
        assert effects[0, 1, 0] @ (high - low) == pytest.approx(0, abs=0.05)


class TestEvidencedReach:
    """How far recommendations go is what the logs can still tell of."""

    @pytest.fixture(scope="class")
    def told(self, learned):
        """The bandit's log as it is where both policies' laws are logged: rows, policy, what stage 1 says."""
        data, policy = learned
        law = np.exp(-0.5 * ((data.action - np.array([4.0, 11.0])) / 2) ** 2) / (2 * np.sqrt(2 * np.pi))
        data = dataclasses.replace(data, law=law, chance=np.full_like(law, 0.5))
        return data, policy, represent(policy.network, StateTensors.of(data, policy.encoding, torch.device("cpu")))

    def reach(self, told, **changed):
        data, policy, seen = told
        return learner.evidenced_reach(policy, seen, dataclasses.replace(data, **changed), np.arange(len(data)))

    def test_the_heaviest_decisions_decide_it(self, told, monkeypatch):
        data, policy, seen = told
        shares = []
        for reach in learner.REACHES:  # beside the function: the law at the recommended action over what the log was drawn from
            reaching = dataclasses.replace(policy, details={"reach": reach})
            weight = np.sort(reaching.density(data.action, reaching.best(reaching.situation_of(seen))) / (0.5 * data.law.sum(1)))
            shares.append(weight[-len(data) // 100 :].sum() / weight.sum())
        assert sorted(shares, reverse=True) == shares, "the farther, the heavier the few"
        for limit, expected in ((max(shares) + 1e-3, 1.0), ((shares[1] + shares[2]) / 2, learner.REACHES[2]), (0.0, learner.UNBORNE)):
            monkeypatch.setattr(learner, "HEAVIEST", limit)
            assert self.reach(told) == expected

    def test_logs_without_laws_cannot_say(self, told, monkeypatch):
        monkeypatch.setattr(learner, "HEAVIEST", 0.0)
        assert self.reach(told, law=np.full_like(told[0].law, np.nan)) == REACH

    def test_logs_in_which_nothing_like_it_was_done_bear_none(self, told):
        data, policy, seen = told
        serving = policy.platform.serving.model_copy(update={"exploration": 1e-5})
        narrow = dataclasses.replace(policy, platform=policy.platform.model_copy(update={"serving": serving}))
        assert self.reach((data, narrow, seen)) == learner.UNBORNE

    def test_a_policy_that_is_served_only_later_does_not_silence_the_logs(self, told, monkeypatch):
        monkeypatch.setattr(learner, "HEAVIEST", 0.0)
        data = told[0]
        nobody = np.full((len(data), 1), np.nan)
        assert self.reach(told, law=np.hstack([data.law, nobody]), chance=np.hstack([data.chance, nobody])) == learner.UNBORNE

    def test_no_recommendation_goes_farther(self, told):
        data, policy, _ = told
        for reach in (0.3, 0.9):
            reaching = dataclasses.replace(policy, details={"reach": reach})
            states = data.states(np.arange(0, len(data), 12))
            enc = reaching.encode(states)
            gone = np.abs(reaching.recommend(states, explore=False).action[:, :1] - reaching.expert_actions(enc)[:, :, 0]) / (
                policy.spread[:, 0] * policy.units.width[0]
            )
            assert gone.min(1).max() <= reach + 1e-6
            assert gone.min(1).max() > 0.9 * reach, "somebody is recommended as much as evidence allows"


def test_how_differently_people_respond_is_found_where_logs_can_tell_and_assumed_where_not():
    rng, n = np.random.default_rng(0), 60_000
    player = np.arange(n) // 10
    noise = rng.normal(size=(n, 2))
    weights = np.array([1.0, -2.0])
    plain = rng.normal(size=(n, 2))
    own_slopes = rng.normal(0, [0.6, 0.2], (n // 10, 2))[player]
    for unexplained, expected in ((plain, [0.0, 0.0]), (plain + np.stack([(own_slopes * noise).sum(1), np.zeros(n)], 1), [0.36, 0.04])):
        own = learner.own_response(unexplained, noise, weights, player, np.array([1.0, 1.0]))
        variance = np.array(own["share"]) * (weights @ np.array(own["covariance"]) @ weights)
        np.testing.assert_allclose(variance, expected, atol=0.06)  # each dimension by itself
        assert max(own["error"]) < min(own["prior"])
        assert min(own["share"]) > 0  # what was found may be below nothing, a variance not
    few = learner.own_response(plain[:50], noise[:50], weights, player[:50], np.array([1.0, 2.0]))
    assert few["found"] is None
    assert few["share"] == few["prior"] == [learner.OWN_RESPONSE, learner.OWN_RESPONSE / 2]
    still = learner.own_response(plain, noise * [0, 1], weights, player, np.array([1.0, 1.0]))  # a policy without noise teaches nothing of it
    assert still["share"][0] == pytest.approx(still["prior"][0], rel=0.01)
    assert still["error"][0] is None
    assert still["share"][1] < still["prior"][1] / 2


@pytest.mark.parametrize(("found", "error"), [(0.1, 0.04), (-0.05, 0.03), (0.02, 0.3), (0.3, 1e-3), (-2.0, 1e-3)])
def test_a_variance_is_what_it_may_be_on_average(found, error):
    grid = np.linspace(0, 1, 2_000_001)
    law = -grid / 0.04 - 0.5 * ((grid - found) / error) ** 2
    law = np.exp(law - law.max())
    expected = (grid * law).sum() / law.sum()
    assert learner.positive_mean(np.array([found]), np.array([error]), np.array([0.04]))[0] == pytest.approx(expected, rel=2e-2, abs=1e-6)


def test_a_variance_is_not_negative_by_rounding():
    """Of a negative one the square root would be no number."""
    assert (learner.positive_mean(np.array([-1.0, -5.0, -0.3]), np.array([1e-9, 1e-9, 1e-6]), np.full(3, 0.04)) >= 0).all()


def test_balance_is_told_by_a_fresh_probe_and_by_how_far_the_states_of_two_policies_are_apart():
    rng, n = np.random.default_rng(0), 2_000
    policy = rng.integers(0, 2, n)
    told = SimpleNamespace(policies=["low", "high"], policy=policy, player=np.arange(n) // 10)
    alike = torch.from_numpy(rng.normal(size=(n, 3))).float()
    shifted = alike + torch.from_numpy(policy).float()[:, None] * torch.tensor([4.0, 0.0, 0.0])
    balanced, unbalanced = (learner.balance_probe(told, SimpleNamespace(b=b), np.arange(n), seed=0) for b in (alike, shifted))
    assert balanced["chance"] == unbalanced["chance"] == 0.5
    assert balanced["probe"] == pytest.approx(0.5, abs=0.07)
    assert unbalanced["probe"] > 0.95
    assert balanced["mmd"] < 0.1
    assert unbalanced["mmd"] > 0.5
