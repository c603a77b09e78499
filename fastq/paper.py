"""The published form of FAST-Q (arXiv 2504.21383), preset `paper`: stage 1, stage 2 and the policy they make, top to bottom.

It stays as it was published, with the authors' hyper-parameters, except where it could not run at all. Each departure stands beside its line as
`departure N`, in the order of the table in infra/decisions/0014. What both forms have in common (windows, batches, records, equations, laws of
served actions, bundles) is not restated here.

1. represent    LSTM, K policy experts, one balancing layer; an adversary behind a reversed gradient names the branch that made a state
2. critic       twin networks of balanced state and action; softmax shares of the value, of objectives now and of the long term
3. actor        TD3+BC: exploits the logged action, or explores in another policy's branch what that policy's expert would do
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastq import equations
from fastq.errors import TrainingError
from fastq.networks import PublishedActor, PublishedCritic, PublishedRepresentation, Represented, Sizes
from fastq.platform import Platform
from fastq.policy import Encoded, Policy, Situation
from fastq.representation import EachEpoch, Lesson, RepresentationModule, Stage, StateTensors, device_of, fit

WEIGHT_DECAY = 1e-5
STAGE_TWO = 20  # epochs of stage 2 for one of stage 1 (published: 2,000 and 100)
DISCOUNT, TAU, ALPHA = 0.7, 0.005, 2.5
CHUNK = 65_536  # pairs of state and action that go through the critics at once


@dataclass(frozen=True)
class PaperPolicy(Policy):
    """A policy of the published form: the actor's own action, valued by the mean of the twin critics.

    The value's parts are shares of it, so they are all of its own sign: an objective that lowers the value has none. The published form has one share
    for the long term of all objectives together; as the report has one per objective, it is spread over them like their immediate shares.
    There is no doubt but the twins' difference, no caution and no guardrail.
    """

    network: PublishedRepresentation  # type: ignore[assignment]  # the three networks are what the two forms do not share
    values: PublishedCritic  # type: ignore[assignment]  # the published twins, with shares instead of parts
    actor: PublishedActor  # type: ignore[assignment]  # the published actor, which knows no reach

    @staticmethod
    def networks(sizes: Sizes) -> tuple[Any, Any, Any]:
        return PublishedRepresentation(sizes), PublishedCritic(sizes), PublishedActor(sizes)

    def situation_of(self, seen: Represented) -> Situation:
        """What is asked of these states; slopes are 0, for the critics are no sum of effects."""
        assignment = torch.softmax(seen.assignment.double(), -1)
        expected = self.expert_features(seen.expected.double())
        proposal = self.actor(seen.b).double()
        twins = self._twins(seen.b, proposal[:, None])[:, :, 0]
        return Situation(
            b=seen.b,
            level=twins.mean(0),
            disagreement=(twins[0] - twins[1])[..., 0].abs(),
            slope=seen.psi.new_zeros(len(proposal), twins.shape[2], 2, expected.shape[2], dtype=torch.float64),
            psi=seen.psi.double(),
            reference=torch.einsum("bk,bkp->bp", assignment, expected),
            expected=expected,
            assignment=assignment,
            proposal=proposal,
            reach=self.reach(expected, assignment),
        )

    def look(self, enc: Encoded) -> Situation:
        with torch.no_grad():
            return self.situation(enc)

    def _search(self, at: Situation, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return self.best_units(at, self.platform.weights, low, high).numpy()

    def value(self, enc: Encoded, actions: Tensor) -> Tensor:
        phi = equations.action_features(self._units(actions.detach().cpu().numpy()), self.polynomial)
        return self.totals(self.situation(enc), phi[:, None])[:, 0, :, 0] @ torch.from_numpy(self.platform.weights)

    def _values(self, at: Situation, action: np.ndarray) -> np.ndarray:
        values: np.ndarray = self.totals(at, equations.action_features(self._units(action), True)[:, None])[:, 0, :, 0].numpy()
        return values

    def expert_features(self, action: Tensor) -> Tensor:
        """[B, K, P] expected action features of each policy, from its expert's action [B, K, D] and its noise, which the evaluation needs."""
        if self.catalogue is not None:
            return action
        low, high = (torch.from_numpy(self.units.standard(edge)).to(action) for edge in self.platform.bounds.T)
        inside = torch.minimum(torch.maximum(action, low), high)
        sd = torch.from_numpy(np.maximum(self.spread, 1e-3)).to(action).expand_as(action)
        flat = (part.reshape(-1, action.shape[2]) for part in (inside, sd, low.expand_as(action), high.expand_as(action)))
        return equations.expected_features(*flat).view(*action.shape[:2], -1)

    def _twins(self, b: Tensor, u: Tensor) -> Tensor:
        """[2, B, C, M, 2] value and immediate value per objective of actions [B, C, D], standard units, by each critic; in the objectives' units."""
        n, c, d = u.shape
        states, actions = b[:, None].expand(-1, c, -1).reshape(n * c, -1), u.reshape(-1, d).float()
        out = [self.values(states[i : i + CHUNK], actions[i : i + CHUNK]) for i in range(0, n * c, CHUNK)]
        q, logits = (torch.cat(parts, 1).double().view(2, n, c, *parts[0].shape[2:]) for parts in zip(*out, strict=True))
        shared = shared_objectives(self.platform)
        shares = equations.share_values(q * self.scale[0], logits, shared)
        immediate, long_term = shares[..., :-1], shares[..., -1:]
        spread = torch.softmax(logits[..., :-1].masked_fill(~shared[:-1], -torch.inf), -1)
        weights = torch.where(shared[:-1], torch.from_numpy(self.platform.weights), 1.0)
        return torch.stack([immediate + long_term * spread, immediate], -1) / weights[:, None]

    def totals(self, at: Situation, phi: Tensor) -> Tensor:
        """[B, C, M, 2] value and immediate value of candidates given by their features [B, C, P], of which the first are the action itself."""
        return self._twins(at.b, phi[..., : len(self.units.centre)]).mean(0)

    def _scores(self, at: Situation, phi: Tensor, w: np.ndarray, doubt: Tensor) -> dict[str, Tensor]:
        value = self.totals(at, phi)[..., 0] @ torch.from_numpy(w)
        return {"value": value, "caution": torch.zeros_like(value), "guardrail": torch.zeros_like(value), "total": value}

    def best_units(self, at: Situation, w: np.ndarray, low: np.ndarray, high: np.ndarray) -> Tensor:
        """[B, D] the actor's action; under other weights than it was trained for, the best of it and the experts' by the reweighted shares."""
        lowest, highest = (torch.from_numpy(self.units.standard(edge)) for edge in (low, high))
        tried = torch.cat([at.proposal[:, None], at.expected[:, :, : at.proposal.shape[1]]], 1)
        tried = torch.minimum(torch.maximum(tried, lowest), highest)  # departure 1: the actor has no bounds, the platform does
        if np.array_equal(w, self.platform.weights):
            return tried[:, 0]
        best = (self._twins(at.b, tried).mean(0)[..., 0] @ torch.from_numpy(w)).argmax(1)
        return tried[torch.arange(len(tried)), best]

    def item_law(self, total: Tensor, at: Situation, share: float) -> Tensor:
        """[B, C] as the default's, with the twins' usual difference in such a state as the temperature."""
        temperature = (at.disagreement @ torch.from_numpy(np.abs(self.platform.weights))).clamp(min=1e-6)
        return self.softened(total / temperature[:, None], share)

    def doubt(
        self, enc: Encoded | Situation, actions: np.ndarray, reference: np.ndarray | None = None, weights: Mapping[str, float] | None = None
    ) -> np.ndarray:
        """[B, C] standard deviation between the twins of the weighted value of actions [B, C, D], or of their difference to `reference`: all there is."""
        at, w = self.situations(enc), torch.from_numpy(self._weights(weights))
        with torch.no_grad():
            q = self._twins(at.b, self._units(actions))[..., 0] @ w
            if reference is not None:
                q = q - self._twins(at.b, self._units(reference))[..., 0] @ w
        return ((q[0] - q[1]).abs() / math.sqrt(2)).numpy()


def shared_objectives(platform: Platform) -> Tensor:
    """[M + 1] bool: which objectives have a share of the value, and the long term, which always has."""
    return torch.from_numpy(np.append(platform.weights > 0, True))


# ---- stage 1 -------------------------------------------------------------------------------------------------------------------
class PublishedStageOne(RepresentationModule):
    """One update of stage 1: the experts' regression, and the adversary behind a reversed gradient of constant strength."""

    named: Tensor
    naming: Tensor

    def __init__(self, network: PublishedRepresentation, states: StateTensors, targets: dict[str, Tensor], validation: Tensor, **settings: Any) -> None:
        super().__init__(network, states, targets, validation, **settings)  # type: ignore[arg-type]  # it stands where the default's network stands
        self.register_buffer("named", torch.zeros(network.sizes.policies))  # how often the adversary named each branch in the last epoch
        self.register_buffer("naming", torch.zeros(network.sizes.policies))  # … and in this one

    def new_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.network.parameters(), lr=self.lr, weight_decay=WEIGHT_DECAY, fused=True)]

    def row_weights(self, rows: Tensor) -> Tensor:
        """[rows] how often each is drawn in the next epoch: by what the adversary named, row by row of the policy that acted."""
        return equations.difficulty_weights(self.named)[self.targets["policy"][rows]]

    def losses(self, index: Tensor, hide: Tensor | None, lam: float) -> tuple[Any, dict[str, Tensor]]:
        x, v, _ = self.states.gather(index, hide)
        b, action, assignment = self.network.branches(x, v)  # type: ignore[operator]  # the inherited stage's network is the default's, this one's the published
        # the published label: which branch made the vector, though every row goes through all of them
        branch = torch.arange(b.shape[1], device=b.device).repeat(len(b))
        # departure 2: cross entropy on logits, all branches in one batch; on a sigmoid and one branch at a time it cannot learn (anchors 7 and 8)
        logits = self.network.adversary(equations.reverse_gradient(b.flatten(0, 1), lam))
        if self.training:
            self.naming += torch.bincount(logits.detach().argmax(1), minlength=b.shape[1])
        return None, {
            "experts": equations.masked_squared_error(action, self.targets["proposed"][index]),  # departure 3: where a policy's proposal is known
            "adversary": functional.cross_entropy(logits, branch),
            "assignment": functional.cross_entropy(assignment, self.targets["policy"][index]),
        }

    def training_step(self, index: Tensor) -> Tensor:
        _, losses = self.losses(index, None, self.final_balance)
        total: Tensor = losses["experts"] + losses["adversary"] + losses["assignment"]
        return total

    def on_train_epoch_end(self) -> None:
        self.named.copy_(self.naming)
        self.naming.zero_()
        super().on_train_epoch_end()


# ---- stage 2 -------------------------------------------------------------------------------------------------------------------
class PublishedStageTwo(Stage):
    """One update of stage 2: twin critics on logged actions; every second time the actor, and then the targets."""

    steps: Tensor
    shared: Tensor

    def __init__(self, policy: PaperPolicy, data: dict[str, Tensor], validation: Tensor, *, seed: int, epochs: int, learning_rate: float) -> None:
        super().__init__(validation, seed=seed, epochs=epochs, learning_rate=learning_rate)
        sizes = policy.network.sizes
        self.critic, self.actor = policy.values, policy.actor
        self.target_critic, self.target_actor = PublishedCritic(sizes), PublishedActor(sizes)
        for target, source in ((self.target_critic, self.critic), (self.target_actor, self.actor)):
            target.load_state_dict(source.state_dict())
            target.requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shared", shared_objectives(policy.platform), persistent=False)
        self.data = data
        self.best_weights = {name: value.clone() for name, value in self.state_dict().items()}
        self.automatic_optimization = False

    def new_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(net.parameters(), lr=self.lr, weight_decay=WEIGHT_DECAY, fused=True) for net in (self.critic, self.actor)]

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(1_000_003 * self.seed + self.epochs_done + 500_009)  # so that a resumed epoch draws what the stopped one drew
        self.train()
        self.target_critic.eval()  # departure 4: a target is one function, whoever stands beside it in the batch

    def critic_loss(self, index: Tensor, noise: Tensor) -> Tensor:
        """Equation 16 of both critics, [2]; the next state is that of the branch that acted here, the next action the target actor's."""
        data, policy = self.data, self.data["policy"][index]
        after = data["after"][index]
        with torch.no_grad():
            b_next = data["b"][after, policy]
            u_next = equations.smoothed_action(self.target_actor(b_next), noise)
            q_next, _ = self.target_critic(b_next, u_next)
            # departure 5: what ends does not bootstrap, for there is no state after it
            target = equations.td_target(data["reward"][index, None], data["discount"][index, None], q_next[..., None], q_next.new_ones(1))[:, 0]
        q, logits = self.critic(data["b"][index, policy], data["action"][index])
        shares = equations.share_values(q, logits, self.shared)[..., :-1]
        return torch.stack([equations.published_critic_loss(q[twin], target, shares[twin], data["immediate"][index]) for twin in range(2)])

    def actor_loss(self, index: Tensor, other: Tensor, explore: Tensor) -> Tensor:
        """Equation 18 in the branch `other` where `explore`, cloning its expert; in the branch that acted elsewhere, cloning what was done."""
        data = self.data
        branch = torch.where(explore, other, data["policy"][index])
        b = data["b"][index, branch]
        u = self.actor(b)
        with frozen(self.critic):  # departure 4 again: the critics' running means are those of logged actions
            q = self.critic(b, u)[0][0]
        return equations.cloning_actor_loss(q, u, torch.where(explore[:, None], data["expert"][index, branch], data["action"][index]), ALPHA)

    def training_step(self, index: Tensor) -> None:
        self.optimizers_[0].zero_grad()
        self.critic_loss(index, torch.randn_like(self.data["action"][index])).sum().backward()
        self.optimizers_[0].step()
        self.steps += 1
        if int(self.steps) % 2:
            return

        share = equations.exploration_share(self.epochs_done / self.epochs)
        explore = torch.rand(len(index), device=self.device) < share  # departure 6: a coin for each sample, not for each batch
        other = torch.randint(self.data["b"].shape[1], (len(index),), device=self.device)
        self.optimizers_[1].zero_grad()
        self.actor_loss(index, other, explore).backward()
        self.optimizers_[1].step()
        for target, source in ((self.target_critic, self.critic), (self.target_actor, self.actor)):
            equations.soft_update([*target.parameters()], [*source.parameters()], TAU)
            for kept, current in zip(target.buffers(), source.buffers(), strict=True):  # departure 4: batch norm's running means too
                kept.copy_(current)

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        self.eval()
        index, data = self.validation, self.data
        policy = data["policy"][index]
        b = data["b"][index, policy]
        losses, u = self.critic_loss(index, torch.zeros_like(data["action"][index])), self.actor(b)
        cloning = equations.masked_squared_error(u, data["action"][index])
        self.epochs_done += 1
        self.history.append({"critic": float(losses.mean()), "q": float(self.critic(b, u)[0].mean()), "cloning": float(cloning)})
        if not all(map(math.isfinite, self.history[-1].values())):
            raise TrainingError(f"stage 2 diverged in epoch {self.epochs_done}: {self.history[-1]}; lower training.learning_rate")
        if self.epochs_done == self.epochs:
            self.best_weights = {name: value.clone() for name, value in self.state_dict().items()}  # the last step's, never the best's
        self.each_epoch(self)


@contextmanager
def frozen(network: torch.nn.Module) -> Iterator[None]:
    """Neither its weights nor its running means move inside."""
    network.eval().requires_grad_(False)
    yield
    network.train().requires_grad_(True)


# ---- both ------------------------------------------------------------------------------------------------------------------------
def learn(lesson: Lesson, made: Callable[..., PaperPolicy]) -> tuple[PaperPolicy, StateTensors, dict[str, list[dict[str, float]]]]:
    """Both stages; no early stopping, the last step counts. Returns policy, states and histories.

    `made` makes the policy from what is learned: what the two forms share of it is the caller's.
    Raises `TrainingError` where no objective has a positive weight, as a share of the value can be nothing else.
    """
    windows, units, rows, checked = lesson.windows, lesson.units, lesson.rows, lesson.checked
    platform = windows.platform
    training = platform.training
    if not (platform.weights > 0).any():
        raise TrainingError("training.preset: paper: expected an objective with a positive weight; the published form cannot represent others")
    polynomial, k = windows.catalogue is None, len(windows.policies)
    sizes = Sizes(
        platform.state.window,
        windows.matrix.shape[1],
        lesson.encoding.attribute_width,
        k,
        windows.action.shape[1],
        polynomial,
        len(platform.objectives),
        expert=128,
        balanced=256,
        hidden=512,
        modifiers=0,
    )
    torch.manual_seed(training.seed)
    network, critic, actor = PaperPolicy.networks(sizes)
    device = device_of(training)
    states = StateTensors.of(windows, lesson.encoding, device)
    action, policies = torch.from_numpy(units.standard(windows.action)).float(), torch.from_numpy(windows.policy)
    targets = {"policy": policies.to(device), "proposed": torch.from_numpy(units.standard(windows.proposals)).float().to(device)}
    settings: dict[str, Any] = {"seed": training.seed, "learning_rate": training.learning_rate}
    one = PublishedStageOne(network, states, targets, torch.from_numpy(checked).to(device), epochs=training.epochs, balance=training.balance, **settings)
    one.to(device)
    whole = training.epochs * (1 + STAGE_TWO)  # more epochs than there are without improvement: none of the stages is stopped early
    fit(one, torch.from_numpy(rows), training.batch_size, EachEpoch("representation", lesson.records[0], whole, lesson.on_progress), resume=lesson.resume)
    network.eval().requires_grad_(False)

    b, expert = every_branch(network.to(device), states)
    away = (action[:, None] - expert).numpy()
    own = [away[rows[windows.policy[rows] == p], p] for p in range(k)]
    spread = np.stack([np.nanstd(noise, 0) if len(noise) > 1 else np.zeros(noise.shape[1]) for noise in own])
    weighted = windows.reward @ platform.weights
    usable = np.isfinite(weighted) & ~windows.truncated & np.isfinite(windows.action).all(1)  # departure 5: what follows the log's end is not known
    if not usable[rows].any():
        raise TrainingError("there is nothing to learn from: no decision has all its objectives known and another one after it")
    # departure 7: in units of their own spread, for a learning rate cannot suit rupees and clicks alike; the shares' sum does not notice
    unit = max(float(weighted[rows[usable[rows]]].std()), 1e-9)
    shared = shared_objectives(platform).numpy()[:-1]
    policy = made(network=network, values=critic, actor=actor, spread=spread, scale=np.full(len(shared), unit))
    data = {
        "b": b,
        "expert": expert,
        "action": torch.nan_to_num(action),
        "policy": policies,
        "after": torch.from_numpy(np.maximum(windows.following, 0)),
        "discount": torch.from_numpy(np.where((windows.following >= 0) & ~windows.terminated, DISCOUNT, 0.0)).float(),
        "reward": torch.from_numpy(np.where(usable, weighted / unit, 0.0)).float(),
        # departure 8: a share is compared with what its objective contributes, w_m r_m; with r_m itself shares would have to sum to more than 1 (anchor 11)
        "immediate": torch.from_numpy(np.where(shared, windows.reward * platform.weights / unit, np.nan)).float(),
    }
    data = {name: tensor.to(device) for name, tensor in data.items()}
    two = PublishedStageTwo(policy, data, torch.from_numpy(checked[usable[checked]]).to(device), epochs=STAGE_TWO * training.epochs, **settings)
    two.to(device)
    fit(
        two,
        torch.from_numpy(rows[usable[rows]]),
        training.batch_size,
        EachEpoch("critics and actor", lesson.records[1], whole, lesson.on_progress),
        resume=lesson.resume,
    )
    two.load_state_dict(two.best_weights)
    for part in (policy.values, policy.actor):
        part.eval().requires_grad_(False)
    return policy, states, {"representation": one.history, "critics_and_actor": two.history}


@torch.no_grad()
def every_branch(network: PublishedRepresentation, states: StateTensors, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Balanced state [N, K, Z] and expert's action [N, K, D] of every decision in every branch: the frozen encoder runs once."""
    parts = [network.branches(*states.gather(piece)[:2])[:2] for piece in torch.arange(len(states.windows), device=states.mean.device).split(chunk)]
    b, action = (torch.cat(found).cpu() for found in zip(*parts, strict=True))
    return b, action
