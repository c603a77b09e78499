"""The preset `paper`: the published form learns, is stored, served, explained and judged like any other model."""

import copy

import numpy as np
import pytest
import torch
from scipy import integrate

from fastq import Policy, equations, evaluation, features, learner, paper
from fastq.errors import TrainingError
from fastq.networks import PublishedRepresentation, VariationalLSTM
from fastq.platform import PAPER, Training
from fastq.representation import StateTensors
from tests.test_learner import bandit


def published(platform, epochs):
    return platform.model_copy(update={"training": Training(preset="paper", epochs=epochs, batch_size=64, learning_rate=5e-3)})


def small(players=80, days=6, epochs=2):
    """A small bandit under the preset: platform and windows."""
    platform, data = bandit(players=players, days=days)
    object.__setattr__(data, "platform", published(platform, epochs))
    return data.platform, data


@pytest.fixture(scope="module")
def learned():
    """Windows, a policy of the published form, and the stage 2 that it came from."""
    torch.set_num_threads(1)
    platform, data = small(players=120, days=8, epochs=5)
    data.terminated[::5] = True
    kept, made = [], paper.PublishedStageTwo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "PublishedStageTwo", lambda *given, **settings: kept.append(made(*given, **settings)) or kept[-1])
        policy = learner.train(platform, data)
    return data, policy, kept[0]


def test_the_preset_says_what_the_file_does_not():
    assert Training(preset="paper").model_dump().items() >= PAPER.items()
    assert Training(preset="paper", epochs=3).epochs == 3
    assert Training().epochs == 50


class TestTheLoop:
    def test_a_bundle_comes_back_the_same_and_is_of_the_published_form(self, learned, tmp_path):
        data, policy, _ = learned
        policy.save(tmp_path / "bundle")
        again = Policy.load(tmp_path / "bundle")
        assert isinstance(again, paper.PaperPolicy)
        states = data.states(np.arange(40))
        first = policy.recommend(states)
        second = again.recommend(states, seeds=first.seeds)
        np.testing.assert_array_equal(first.action, second.action)
        np.testing.assert_array_equal(first.propensity, second.propensity)
        np.testing.assert_array_equal(first.by_objective, second.by_objective)

    def test_the_propensity_is_the_density_of_what_is_served(self, learned):
        data, policy, _ = learned
        found = policy.recommend(data.states(np.arange(1)))

        def density(size):
            return float(policy.density(np.array([[size]]), found.mean)[0])

        assert found.propensity[0] == pytest.approx(density(float(found.action[0, 0])), rel=1e-12)
        whole, _ = integrate.quad(density, 0, 15, points=[float(found.mean[0, 0])], limit=200)
        assert whole == pytest.approx(1, rel=1e-6)

    def test_shares_times_the_value_add_up_and_an_objective_that_lowers_it_has_none(self, learned):
        data, policy, _ = learned
        states = data.states(np.arange(60))
        explained = policy.explain(states, against="high", weights={"gain": 2.0}, attributions=False)
        size = np.maximum(np.abs(explained.parts).sum((1, 2)), 1)
        assert (np.abs(explained.parts.sum((1, 2)) - explained.value) <= 1e-12 * size).all()
        assert (np.abs(explained.contrast.parts.sum((1, 2)) - explained.contrast.difference) <= 1e-12 * size).all()
        twins = policy._twins(policy.situations(policy.encode(states)).b, policy._units(explained.action[:, None]))[..., 0]
        weights = torch.from_numpy(policy.platform.weights)
        np.testing.assert_allclose(explained.value, (twins @ weights).mean(0)[:, 0], rtol=1e-12)
        assert (explained.parts[:, 1] == 0).all(), "the cost has no share"
        assert (np.sign(explained.parts[:, 0]) == np.sign(explained.value)[:, None]).all(), "shares are of the value's own sign"

    def test_the_value_is_what_the_critics_say(self, learned):
        data, policy, _ = learned
        enc = policy.encode(data.states(np.arange(5)))
        with torch.no_grad():
            q, _ = policy.values(policy.situations(enc).b, policy._units(data.action[:5]).float())
        np.testing.assert_allclose(policy.value(enc, torch.from_numpy(data.action[:5])).detach(), q.mean(0) * policy.scale[0], rtol=1e-5)

    def test_it_is_judged_by_the_gate(self, learned):
        data, policy, _ = learned
        report = evaluation.evaluate(policy, data)
        assert any(record["policy"] == "fastq" and np.isfinite(record["value"]) for record in report.estimates)

    def test_it_learns_what_the_experts_do_and_which_way_is_better(self, learned):
        data, policy, _ = learned
        at = policy.situations(policy.encode(data.states(np.arange(100))))
        np.testing.assert_allclose(policy.expert_actions(at).mean(0)[:, 0], [4, 11], atol=1.5)
        assert policy.details["history"]["representation"][-1]["experts"] < policy.details["history"]["representation"][0]["experts"]
        trained_on = policy.details["history"]["critics_and_actor"]
        assert trained_on[-1]["critic"] < trained_on[0]["critic"]


class TestOneUpdate:
    def test_gradients_reach_all_of_stage_1_and_the_assignment_moves_nothing_else(self):
        platform, data = small(players=30, days=4)
        encoding = features.fit_encoding(platform, data.matrix, data.attributes)
        network = PublishedRepresentation(paper_sizes(platform, data, encoding))
        states = StateTensors.of(data, encoding, torch.device("cpu"))
        proposed = torch.from_numpy(data.proposals).float()
        targets = {"policy": torch.from_numpy(data.policy), "proposed": proposed}
        one = paper.PublishedStageOne(network, states, targets, torch.arange(10), seed=0, epochs=2, learning_rate=1e-3, balance=0.1)
        one.training_step(torch.arange(100)).backward()
        dead = [name for name, p in network.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0]
        assert not dead, dead
        assert int(one.naming.sum()) == 2 * 100, "every row goes through every branch"
        network.zero_grad()
        one.losses(torch.arange(100), None, 0.1)[1]["assignment"].backward()
        moved = [name for name, p in network.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0]
        assert moved == ["assignment.weight", "assignment.bias"]

    def test_the_reversal_moves_the_balancing_layer_against_the_adversary(self):
        platform, data = small(players=30, days=4)
        encoding = features.fit_encoding(platform, data.matrix, data.attributes)
        network = PublishedRepresentation(paper_sizes(platform, data, encoding)).eval()
        states = StateTensors.of(data, encoding, torch.device("cpu"))
        targets = {"policy": torch.from_numpy(data.policy), "proposed": torch.from_numpy(data.proposals).float()}
        one = paper.PublishedStageOne(network, states, targets, torch.arange(10), seed=0, epochs=2, learning_rate=1e-3, balance=0.1).eval()

        def gradients(lam):
            network.zero_grad()
            one.losses(torch.arange(64), None, lam)[1]["adversary"].backward()
            return network.balance[0].weight.grad.clone(), network.adversary[0].weight.grad.clone()

        (balance, adversary), (against, same) = gradients(0.1), gradients(-1.0)
        torch.testing.assert_close(balance, -0.1 * against, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(adversary, same, rtol=1e-4, atol=1e-8)

    def test_stage_2_trains_critics_and_actor_and_nothing_else(self, learned):
        two = stage_two(learned)
        index, other = torch.arange(120), torch.zeros(120, dtype=torch.int64)
        two.critic_loss(index, torch.randn(120, 1)).sum().backward()
        reached = {name.split(".")[0] for name, p in two.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
        assert reached == {"critic"}
        assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in two.critic.parameters())
        two.zero_grad(set_to_none=True)
        before = [b.clone() for b in two.critic.buffers()]
        two.actor_loss(index, other, torch.rand(120) < 0.5).backward()
        assert {name.split(".")[0] for name, p in two.named_parameters() if p.grad is not None} == {"actor"}
        assert all(torch.equal(a, b) for a, b in zip(before, two.critic.buffers(), strict=True)), "the actor's actions move no running mean"

    def test_exploring_takes_another_branch_and_clones_its_expert(self, learned, monkeypatch):
        two, seen = stage_two(learned), []
        monkeypatch.setattr(equations, "cloning_actor_loss", lambda q, u, cloned, alpha: seen.append(cloned) or u.sum())
        index, policy = torch.arange(50), two.data["policy"][:50]
        two.actor_loss(index, 1 - policy, torch.ones(50, dtype=torch.bool))
        two.actor_loss(index, 1 - policy, torch.zeros(50, dtype=torch.bool))
        torch.testing.assert_close(seen[0], two.data["expert"][index, 1 - policy])
        torch.testing.assert_close(seen[1], two.data["action"][index])

    def test_what_ends_does_not_bootstrap_and_what_follows_the_log_is_not_guessed(self, learned):
        data, _, two = learned
        kept = two.data["discount"].numpy()
        np.testing.assert_allclose(kept[data.terminated], 0)
        np.testing.assert_allclose(kept[(data.following >= 0) & ~data.terminated], 0.7, rtol=1e-6)
        assert not np.isin(np.flatnonzero(data.truncated), two.validation.numpy()).any()
        ended, going_on = (torch.from_numpy(np.flatnonzero(which)[:40]) for which in (data.terminated, (data.following >= 0) & ~data.terminated))
        two = stage_two(learned).eval()
        with torch.no_grad():
            before = [two.critic_loss(index, torch.zeros(40, 1)) for index in (ended, going_on)]
            two.target_critic.twins[0][-1].bias += 1.0
            two.target_critic.twins[1][-1].bias += 1.0
            after = [two.critic_loss(index, torch.zeros(40, 1)) for index in (ended, going_on)]
        assert torch.equal(before[0], after[0])
        assert not torch.allclose(before[1], after[1])


def test_the_masked_lstm_is_the_fused_one_when_nothing_is_dropped():
    torch.manual_seed(0)
    lstm, x = VariationalLSTM(5, 8, 1e-9), torch.randn(6, 7, 5)
    torch.testing.assert_close(lstm.train()(x), lstm.eval()(x), rtol=1e-5, atol=1e-6)
    dropped = VariationalLSTM(5, 8, 0.5).train()
    assert not torch.allclose(dropped(x), dropped.eval()(x))


@pytest.mark.parametrize("stop_in", ["representation", "critics and actor"])
def test_killed_and_resumed_equals_never_stopped_bit_for_bit(tmp_path, stop_in, monkeypatch, trained_whole_and_resumed):
    torch.set_num_threads(1)
    monkeypatch.setattr(paper, "STAGE_TWO", 2)  # a tenth of the epochs is enough to be stopped in
    platform, data = small(players=60, days=5)

    trained_whole_and_resumed(platform, data, tmp_path, stop_in, 1)


def test_objectives_that_only_lower_the_value_are_refused_in_words():
    platform, data = small(players=40, days=4)
    objectives = {name: o.model_copy(update={"weight": -1.0}) for name, o in platform.objectives.items()}
    object.__setattr__(data, "platform", platform.model_copy(update={"objectives": objectives}))
    data.platform.__dict__.pop("weights", None)
    with pytest.raises(TrainingError, match="expected an objective with a positive weight"):
        learner.train(data.platform, data)


def paper_sizes(platform, data, encoding):
    return paper.Sizes(platform.state.window, data.matrix.shape[1], encoding.attribute_width, 2, 1, True, 2, expert=128, balanced=256, hidden=512, modifiers=0)


def stage_two(learned):
    """Stage 2 as it is after training, on its own data, ready to go on."""
    two = copy.deepcopy(learned[2])
    two.critic.requires_grad_(True)
    two.actor.requires_grad_(True)
    two.train()
    two.target_critic.eval()
    return two
