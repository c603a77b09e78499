"""Learning on CUDA: a step does what it does on the processor, a stopped run ends where it would have, and the policy comes home. Needs a CUDA device."""

import numpy as np
import pytest
import torch

from fastq import Policy, equations, features, learner, representation
from fastq.features import Units
from fastq.networks import Representation, Sizes
from fastq.representation import RepresentationModule, StateTensors
from tests.test_learner import bandit, finds_the_best_action

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device here")


def on_cuda(preset="default"):
    """A small bandit that learns there: platform and windows."""
    platform, data = bandit(players=120, days=8, epochs=4)
    training = platform.training.model_copy(update={"accelerator": "cuda", "preset": preset})
    object.__setattr__(data, "platform", platform.model_copy(update={"training": training}))
    return data.platform, data


def one_step(data, device):
    """Losses and gradients of one batch of stage 1, without dropout and with the same weights everywhere."""
    torch.manual_seed(3)
    encoding = features.fit_encoding(data.platform, data.matrix, data.attributes)
    units = Units.of(data.action, catalogue=False)
    sizes = Sizes(data.platform.state.window, data.matrix.shape[1], encoding.attribute_width, len(data.policies), 1, True, 2)
    network = Representation(sizes).to(device).eval()
    actions = (torch.from_numpy(units.standard(given)).float() for given in (data.action, data.proposals))
    phi, proposed = (equations.action_features(action, True).to(device) for action in actions)
    outcomes = torch.from_numpy(np.concatenate([data.reward, data.reward], 1)).float().to(device)
    targets = {"policy": torch.from_numpy(data.policy).to(device), "features": phi, "proposed": proposed, "outcomes": outcomes}
    module = RepresentationModule(network, StateTensors.of(data, encoding, device), targets, torch.arange(1), seed=0, epochs=1, learning_rate=1e-3, balance=0.1)
    _, losses = module.losses(torch.arange(200, device=device), torch.arange(200, device=device) % 3 == 0, 0.1)
    sum(losses.values()).backward()
    gradients = {name: p.grad.cpu() for name, p in network.named_parameters() if p.grad is not None}
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients


def test_a_step_does_what_it_does_on_the_processor():
    _, data = on_cuda()
    there, here = (one_step(data, torch.device(device)) for device in ("cuda", "cpu"))
    assert there[0] == pytest.approx(here[0], rel=1e-4)
    assert there[1].keys() == here[1].keys()
    for name, gradient in here[1].items():
        torch.testing.assert_close(
            there[1][name], gradient, rtol=1e-3, atol=1e-5 + 1e-3 * float(gradient.abs().max()), msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_what_was_learned_there_is_stored_and_recommends_as_any_policy(preset, tmp_path):
    platform, data = on_cuda(preset)
    torch.cuda.reset_peak_memory_stats()
    policy = learner.train(platform, data)
    assert torch.cuda.max_memory_allocated() > 0, "it did not learn there"
    modules = (policy.network, policy.values, policy.actor)
    assert {tensor.device.type for module in modules for tensor in module.state_dict().values()} == {"cpu"}
    policy.save(tmp_path / "bundle")
    states = data.states(np.arange(40))
    first = policy.recommend(states)
    again = Policy.load(tmp_path / "bundle").recommend(states, seeds=first.seeds)
    np.testing.assert_array_equal(first.action, again.action)
    assert np.isfinite(first.value).all()


def test_the_known_best_action_is_found_there():
    platform, data = bandit(epochs=15)
    assert representation.device_of(platform.training).type == "cuda", "auto takes the device that there is"
    finds_the_best_action(data, learner.train(platform, data))


@pytest.mark.parametrize(
    ("preset", "stop_in"), [("default", "representation"), ("default", "value and actor"), ("paper", "representation"), ("paper", "critics and actor")]
)
def test_killed_and_resumed_equals_never_stopped_bit_for_bit(preset, stop_in, tmp_path, trained_whole_and_resumed):
    trained_whole_and_resumed(*on_cuda(preset), tmp_path, stop_in, 2)
