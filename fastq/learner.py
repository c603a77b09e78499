"""Stage 2: the orthogonal critic, the level of the values, the actor. The whole algorithm, top to bottom.

1. represent    every decision once, with the frozen stage 1
2. critic       per objective, the effect of what was left to chance, which policy acted and its own noise, on what a decision brought: its outcome and a
                better or worse state than before, valued by how players' own ups and downs go on;
                shrunk to what players it has not seen confirm; its doubt kept jointly over objectives, clustered by player
3. bound        candidates are ranked by value - caution * doubt - guardrail; the guardrails' prices are found by bisection
4. level        the value of the policy itself, by temporal differences on twin heads
5. actor        proposes candidates: exploits logged states and explores counterfactual ones, up to the bound
"""

from __future__ import annotations

import functools
import math
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.special import erfcx
from torch import Tensor

from fastq import equations, paper
from fastq.errors import TrainingError
from fastq.features import Units, fit_encoding
from fastq.networks import Actor, Represented, Values
from fastq.platform import Platform
from fastq.policy import REACH, Policy, Reference, Situation
from fastq.representation import (
    ALONE,
    WARM_EPOCHS,
    WARM_PATIENCE,
    EachEpoch,
    Lesson,
    Part,
    Progress,
    Stage,
    fit,
    histories,
    outcome_targets,
    represent,
    train_representation,
)
from fastq.windows import Windows, held_out_players

FOLDS = 4  # of players, for nuisances and for what unseen players confirm
NUISANCE_RIDGE = 30.0  # rows' worth of prior on standardised features
VALUE_RIDGE = 3.0  # the same for what is still to come; more of it makes short-sighted (infra/log.md)
RIDGES = np.geomspace(3.0, 30_000.0, 13)  # prior precisions tried for the effects, per standard deviation of the outcome
INTERACTIONS = (0.0, 0.1, 0.3, 1.0)  # prior scales tried for effects that depend on the state, relative to those that do not
CURVATURES = (0.1, 0.3, 1.0)  # and for products, squares and cubes of actions, relative to the action itself
BEYOND_CHANCE = 6.0  # squared errors, in variances of one, that a prediction has to save on unseen players; one in eight of noise does (infra/log.md)
DOUBT_RIDGE = 1.0  # weak, pooled: the doubt must not shrink with the mean
LARGEST_PRICE = 64.0  # of a guardrail, in largest objective weights
GUARDRAIL_SAMPLE = 1_024  # states on which the guardrails' prices are found
AT_EDGE = 0.01  # of a range: nearer than that is at its end
TAIL = 0.05  # of the discounted sum, left to the value itself where returns are compared with it
LOOKED_AT = 8_192  # decisions whose situations are in memory together
LEAST_PROBED, MMD_ROWS = 20, 500  # players below which balance is told on those who were learned from; states of each policy that are compared
REFERENCE_ROWS = 20_000  # logged decisions kept in the bundle as evidence
TAU, LEVEL_EPOCHS, PATIENCE = 0.005, 20, 5
LATER = 2  # training horizons over which outcomes are summed where people's own responses are asked about, which show late
OWN_RESPONSE = 0.01  # share of what stays unexplained that people's own responses to one dimension are taken for; chosen on simulated players
UNKNOWN = 30.0  # times its prior mean by which a variance may be off before the logs are taken to say nothing of it
REACHES, UNBORNE = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3), 0.55  # how far evidence may reach, in standard deviations; where the logs bear none
WEIGHED = 20_000  # decisions by which that is found out
HEAVIEST = 0.22  # share of all weight that the heaviest hundredth may carry; the gate, which asks other players, trusts no estimate above 0.3
LEAST_ROWS = 100  # decisions below which neither own responses nor the reach are asked of the logs


@dataclass(frozen=True)
class Critic:
    """What the orthogonal critic learned: effects, covariance and spread (see `Policy`) and, per objective, what unseen players confirmed.

    confirmed [M, 2]: slope of the held-out residual on the predicted effect, of the value and of the immediate value; gain [M, 2]: share of
    the residual's variance that the prediction explained there. compared: share of the decisions whose policies were compared with each other.
    own_response: see `own_response`.
    """

    effects: np.ndarray
    covariance: np.ndarray
    spread: np.ndarray
    confirmed: np.ndarray
    gain: np.ndarray
    compared: float
    own_response: dict[str, Any]


def player_folds(player: np.ndarray, seed: int) -> np.ndarray:
    """[N] fold of each row, the same for all rows of a player."""
    return np.random.default_rng(seed).permutation(int(player.max()) + 1)[player] % FOLDS


def known_together(y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows [N] bool and columns of `y` [N, T] that are known in just these rows: they share one factorisation."""
    known, alike = np.isfinite(y).T, defaultdict[bytes, list[int]](list)
    for column, rows in enumerate(known):
        alike[rows.tobytes()].append(column)
    for columns in alike.values():
        yield known[columns[0]].copy(), np.array(columns)


def out_of_fold(x: np.ndarray, y: np.ndarray, group: np.ndarray, fold: np.ndarray, fit_on: np.ndarray) -> np.ndarray:
    """[N, T] ridge predictions of `y` within each group of rows, from the rows `fit_on` of other players; NaN targets are left out."""
    predicted = np.zeros_like(y)
    for g in np.unique(group):
        here = np.flatnonzero(group == g)
        for rows, columns in known_together(np.where(fit_on[here, None], y[here], np.nan)):
            known, mine = here[rows], [here[fold[here] == k] for k in range(FOLDS)]
            ours = [known[fold[known] == k] for k in range(FOLDS)]  # a fold's others are all less its own, so each is multiplied out once
            gram, moment = (np.stack(parts) for parts in zip(*((x[own].T @ x[own], x[own].T @ y[np.ix_(own, columns)]) for own in ours), strict=True))
            total, sums = np.stack([y[np.ix_(own, columns)].sum(0) for own in ours]), np.stack([x[own].sum(0) for own in ours])
            for k in range(FOLDS):
                others = [each.sum(0) - each[k] for each in (gram, moment, total, sums)]
                if (count := len(known) - len(ours[k])) > 0:
                    mean = others[2] / count
                    slope = equations.ridge_from(others[0], others[1] - np.outer(others[3], mean), NUISANCE_RIDGE)
                    predicted[np.ix_(mine[k], columns)] = mean + x[mine[k]] @ slope
    return predicted


def chance_to_act(windows: Windows, seen: Represented, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n, K] how likely each policy was to act in these states, and [n] whether the log tells it, of more than one; elsewhere it is what stage 1 found.

    A choice that sticks to a player was made in an earlier state, and its probability says nothing of this one.
    """
    logged, told = windows.chances(rows)
    told &= (logged.max(1) < 1) & (windows.platform.assignment == "decision")
    found = torch.softmax(seen.assignment[torch.from_numpy(rows)].double(), -1).numpy()
    return np.where(told[:, None], logged, found), told


def still_to_come(windows: Windows, history: np.ndarray, rows: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """[n, M] how much more of each objective follows from the states of the decisions `rows` than from their players' usual ones, if it goes on as logged.

    Linear in the history [n, H], by least-squares temporal differences (Bradtke & Barto, Machine Learning 22, 1996) from players of other folds. Instruments
    are the history less the player's mean, so that what a player brings in every state drops out, as in a panel's within estimator: without that, an action
    that leads to a state in which good players often are would be credited with the players (infra/decisions/0022). 0 where nothing later counts.
    """
    player, discounts, each = windows.player[rows], windows.platform.discounts, windows.discount[rows]
    outcome = np.where(windows.open_ended[rows], np.nan, windows.reward[rows])
    place = np.full(len(windows), -1)
    place[rows] = np.arange(len(rows))
    after, value = place[windows.following[rows]], np.zeros_like(outcome)
    for later in np.unique(discounts[discounts > 0]):
        alike = np.flatnonzero(discounts == later)
        for known, found in known_together(outcome[:, alike]):
            here, columns, d = np.flatnonzero(known), alike[found], each[:, alike[:1]]
            if len(here) == 0:
                continue
            of_player = csr_array((np.ones(len(here)), (player[here], np.arange(len(here)))))
            usual = (of_player @ history[here]) / np.maximum(of_player.sum(1), 1)[:, None]
            gram, moment = np.zeros((FOLDS, *2 * history.shape[1:])), np.zeros((FOLDS, history.shape[1], len(columns)))
            for piece in np.array_split(here, -(-len(here) // LOOKED_AT)):
                for k in range(FOLDS):
                    own = piece[fold[piece] == k]
                    instrument = history[own] - usual[player[own]]
                    gram[k] += instrument.T @ (history[own] - d[own] * history[after[own]])
                    moment[k] += instrument.T @ outcome[np.ix_(own, columns)]
            for k in range(FOLDS):  # a fold's others are all less its own
                others = gram.sum(0) - gram[k] + VALUE_RIDGE * np.eye(history.shape[1])
                value[np.ix_(fold == k, columns)] = history[fold == k] @ np.linalg.solve(others, moment.sum(0) - moment[k])
    return value


def orthogonal_critic(windows: Windows, seen: Represented, features: np.ndarray, history: np.ndarray, rows: np.ndarray, seed: int) -> Critic:
    """Step 2 on the decisions `rows`: what actions did to each objective, at once and for good, where it was left to chance which was taken.

    What a decision brought is its temporal difference: what it gained, and by how much it led to a better state (`still_to_come`, history [n, H]).

    Where the log tells how likely each policy was to act, both who acted and that policy's own noise were chance, and most can be learned from how policies
    differ. Elsewhere something that no log holds may have decided who acts, and only each policy's own noise is believed (infra/decisions/0020).
    """
    policy, player = windows.policy[rows], windows.player[rows]
    fold = player_folds(player, seed)
    promised = np.zeros_like(windows.reward)
    promised[rows] = still_to_come(windows, history, rows, fold)
    brought = equations.horizon_return(windows.reward, windows.discount, windows.following, windows.open_ended, promised, 1) - promised
    targets = np.stack([brought, windows.reward], -1)[rows].reshape(len(rows), -1)  # [n, M * 2]
    scale = np.nan_to_num(np.nanstd(targets, 0), nan=1.0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    b, psi = (part.numpy()[rows].astype(float) for part in (seen.b, seen.psi))
    every = seen.expected.numpy()[rows]  # the largest array here, so it stays as it is
    usable = np.isfinite(features[rows]).all(1)
    phi = np.nan_to_num(features[rows])
    m, d = len(windows.platform.objectives), windows.action.shape[1]
    chance, told = chance_to_act(windows, seen, rows)
    state = np.concatenate([b - b.mean(0), psi[:, 1:]], 1)

    acted = every[np.arange(len(rows)), policy].astype(float)
    expected = np.where(told[:, None], np.einsum("nk,nkp->np", chance, every), acted)
    known_before = [expected, chance[:, 1:], every[..., :d].reshape(len(rows), -1)]
    x = np.concatenate([state, *(part - part.mean(0) for part in known_before)], 1)
    compared = np.where(told, len(windows.policies), policy)  # with whom a decision is: with all that were left to chance, or with its own policy's

    def left_over(y: np.ndarray) -> np.ndarray:
        return y - out_of_fold(x, y, compared, fold, usable)

    centred, residual = left_over(phi - expected), left_over(targets / scale)
    design = equations.orthogonal_design(psi, centred)

    n_targets, s, p = targets.shape[1], psi.shape[1], phi.shape[1]
    priors = prior_scales(s, p, d)
    effects, confirmed, gain = np.zeros((n_targets, s * p)), np.zeros(n_targets), np.zeros(n_targets)
    for known, columns in known_together(residual):
        known &= usable
        if known.sum() > FOLDS * 10:
            effects[columns], confirmed[columns], gain[columns] = confirmed_effects(design[known], residual[np.ix_(known, columns)], fold[known], priors)
    complete = usable & np.isfinite(residual[:, 0::2]).all(1)
    errors = (residual[:, 0::2] - design @ effects[0::2].T)[complete]
    if complete.sum() < 2:
        raise TrainingError("no decision has all its objectives known; nothing can be learned yet")
    covariance = (
        equations.clustered_covariance(design[complete], errors, player[complete], DOUBT_RIDGE) * np.multiply.outer(scale[0::2], scale[0::2])[:, :, None, None]
    )
    own = (phi - acted)[:, :d]
    spread = np.stack([own[usable & (policy == k)].std(0) if (usable & (policy == k)).sum() > 1 else np.zeros(d) for k in range(len(windows.policies))])
    in_units = (effects * scale[:, None]).reshape(m, 2, s, p)
    horizon = LATER * windows.platform.training.horizon
    later = outcome_targets(windows, horizon)[1][rows]
    if (usable & np.isfinite(later).all(1)).sum() < LEAST_ROWS:  # the log is shorter than that
        horizon = windows.platform.training.horizon
        later = outcome_targets(windows, horizon)[1][rows]
    unexplained = left_over(later) - design @ in_units[:, 0].reshape(m, -1).T
    known = usable & np.isfinite(unexplained).all(1)
    logged = np.var(phi[usable, :d], 0)
    differing = own_response(unexplained[known], own[known], windows.platform.weights, player[known], logged) | {"horizon": horizon}
    return Critic(in_units, covariance, spread, confirmed.reshape(m, 2), gain.reshape(m, 2), float(told.mean()), differing)


def own_response(unexplained: np.ndarray, noise: np.ndarray, weights: np.ndarray, player: np.ndarray, logged: np.ndarray) -> dict[str, Any]:
    """How much people who look alike differ in what an action does to them, as variance per squared distance between two actions, by dimension.

    Random coefficients (Hildreth & Houck, JASA 1968): what is unexplained [n, M] varies the more, the further the policies' own noise [n, D] took the
    action; the slopes of its square on the squared distances are those variances. Logs tell them poorly, with a player-clustered error, so each has a prior:
    positive, with a mean of `OWN_RESPONSE` of the unexplained variance over the `logged` variance [D] of that dimension, and nothing else known of it, which
    is the exponential law. `share` [D] is the posterior mean: what is not known of a variance widens an interval like the variance itself. It is relative to
    the unexplained `covariance` [M, M], so that it holds under any objective weights; `found` and `error`: what the logs alone said, `prior`: what was assumed.
    """
    m, prior = len(weights), OWN_RESPONSE / np.maximum(logged, 1e-9)
    answer = {"share": prior.tolist(), "prior": prior.tolist(), "found": None, "error": None, "covariance": np.zeros((m, m)).tolist()}
    if len(unexplained) < 2:
        return answer
    answer["covariance"] = np.cov(unexplained.T).reshape(m, m).tolist()
    square, away = (unexplained @ weights) ** 2, noise**2 - np.mean(noise**2, 0)
    level, gram = square.mean(), away.T @ away
    if len(unexplained) < LEAST_ROWS or level <= 0:
        return answer
    inverse = np.linalg.pinv(gram, hermitian=True)
    found = inverse @ (away.T @ (square / level))
    scores = np.zeros((int(player.max()) + 1, len(found)))
    np.add.at(scores, player, away * (square / level - 1 - away @ found)[:, None])
    error = np.sqrt(np.diag(inverse @ (scores.T @ scores) @ inverse))
    error = np.where(np.diag(gram) > 1e-12, error, np.inf)  # policies without noise teach nothing of it
    share = positive_mean(found, np.clip(error, 1e-9, UNKNOWN * prior), prior)
    return answer | {"share": share.tolist(), "found": found.tolist(), "error": [float(e) if np.isfinite(e) else None for e in error]}


def positive_mean(found: np.ndarray, error: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Posterior mean of positive numbers with exponential priors of mean `prior`, found with a normal `error`: that of a normal law cut off at 0.

    By the scaled complementary error function: `scipy.stats.truncnorm` loses all digits where nearly all of the law is cut off.
    """
    centre = found - error**2 / prior
    cut = -centre / error
    hazard = np.sqrt(2 / np.pi) / erfcx(cut / np.sqrt(2))
    return np.maximum(centre + error * hazard, 0.0)  # of a number far below 0 only rounding is left


def confirmed_effects(design: np.ndarray, residual: np.ndarray, fold: np.ndarray, priors: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Effects [T, S * P] whose prior is the one that players left out confirm best, shrunk by the slope [T] that they confirm; 0 where they confirm nothing.

    design [n, S * P], residual [n, T], priors: the scales [S * P] that are tried, each at every strength of `RIDGES`. Last comes, [T], the share of the
    residual's variance that predictions explained there.
    """
    grams = np.stack([design[fold == k].T @ design[fold == k] for k in range(FOLDS)])
    moments = np.stack([design[fold == k].T @ residual[fold == k] for k in range(FOLDS)])
    t = residual.shape[1]
    best, slope, chosen = BEYOND_CHANCE * np.square(residual).mean(0), np.zeros(t), np.zeros((t, 2))
    for prior, d in enumerate(priors):
        for_each = []
        for k in range(FOLDS):
            value, vector = np.linalg.eigh(d[:, None] * (grams.sum(0) - grams[k]) * d)
            for_each.append((np.maximum(value, 0)[:, None], vector, vector.T @ (d[:, None] * (moments.sum(0) - moments[k]))))
        for strength in RIDGES:
            fitted = np.stack([d[:, None] * (vector @ (projected / (value + strength))) for value, vector, projected in for_each])
            cross, square = np.einsum("kdt,kdt->t", fitted, moments), np.einsum("kdt,kdt->t", fitted, grams @ fitted)
            better = 2 * cross - square > best
            best[better], slope[better] = (2 * cross - square)[better], (cross / np.maximum(square, 1e-12))[better]
            chosen[better] = prior, strength
    effects, confirmed = np.zeros((t, design.shape[1])), slope > 0
    for prior, strength in np.unique(chosen[confirmed], axis=0):
        alike, d = (chosen == (prior, strength)).all(1) & confirmed, priors[int(prior)]
        fitted = equations.ridge_from(d[:, None] * grams.sum(0) * d, d[:, None] * moments.sum(0)[:, alike], strength)
        effects[alike] = (d[:, None] * fitted).T * np.minimum(slope[alike], 1.0)[:, None]
    return effects, slope, np.where(confirmed, best, 0.0) / np.maximum(np.square(residual).sum(0), 1e-12)


def prior_scales(s: int, p: int, d: int) -> list[np.ndarray]:
    """[S * P] each: how large effects may be that depend on the state, beside those that do not (the first P), and those of products, squares and cubes
    (all action features but the first D), beside those of the action itself.
    """
    depends, bends = np.arange(s * p) >= p, np.arange(s * p) % p >= d
    return [np.where(depends, i, 1.0) * np.where(bends, c, 1.0) for i in INTERACTIONS for c in (CURVATURES if p > d else (1.0,))]


class ValueAndActor(Stage):
    """Steps 4 and 5. One update: twin levels by temporal differences under the actor, then the actor up to the bound.

    Everything a step does is in `training_step`; `state_dict` holds networks and targets, the record adds optimisers and the epoch.
    """

    def __init__(
        self, policy: Policy, data: dict[str, Tensor], validation: Tensor, *, seed: int, epochs: int, learning_rate: float, part: Part = ALONE
    ) -> None:
        super().__init__(validation, seed=seed, epochs=epochs, learning_rate=learning_rate, part=part)
        sizes = policy.network.sizes
        self.values, self.actor, self.target = policy.values, policy.actor, Values(sizes)
        self.target.load_state_dict(self.values.state_dict())
        self.target.requires_grad_(False)
        self.data, self.polynomial, self.caution = data, policy.polynomial, policy.caution
        self.best_weights = {name: value.clone() for name, value in self.state_dict().items()}
        self.automatic_optimization = False

    def new_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(net.parameters(), lr=self.lr / 3, weight_decay=1e-5, fused=True) for net in (self.values, self.actor)]

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(1_000_003 * self.seed + self.epochs_done + 500_009)

    def advantage(self, phi: Tensor, index: Tensor) -> Tensor:
        """[B, M, 2] effect of action features, of the value and of the immediate value, against the reference; networks' units."""
        return torch.einsum("bs,mtsp,bp->bmt", self.data["psi"][index], self.data["effects"], phi - self.data["reference"][index])

    def bound(self, u: Tensor, index: Tensor) -> Tensor:
        """[B] Eq. 9 of actions in standard units, against the reference."""
        data = self.data
        difference = equations.action_features(u, self.polynomial) - data["reference"][index]
        design = (data["psi"][index][:, :, None] * difference[:, None]).flatten(1)
        variance = ((design @ data["doubt"]) * design).sum(-1)
        return equations.lower_bound((data["priced"][index] * difference).sum(-1), variance, self.caution)

    def training_step(self, whole: Tensor) -> None:
        data, part = self.data, self.part
        index = part.mine(whole)
        # level: r + discount * (level + effect of the policy's action) there, less the effect of the logged action here
        after = data["after"][index]
        with torch.no_grad():
            next_phi = equations.action_features(self.actor(data["b"][after], data["reach"][after]), self.polynomial)
            next_q = self.target(data["b"][after])[..., 0] + self.advantage(next_phi, after)[..., 0]
            target = equations.td_target(data["reward"][index], data["discount"][index], next_q, data["weight"])
            here = self.advantage(data["phi"][index], index)
            targets = torch.stack([target - here[..., 0], data["reward"][index] - here[..., 1]], -1)
            targets = torch.where(data["usable"][index][:, :, None], targets, torch.nan)
        level = self.values(data["b"][index])
        loss = equations.masked_squared_error(level[0], targets) + equations.masked_squared_error(level[1], targets)
        self.optimizers_[0].zero_grad()
        (loss if part.of == 1 else loss * part.share(data["usable"][whole])).backward()
        part.average_gradients(self.values)
        self.optimizers_[0].step()
        equations.soft_update([*self.target.parameters()], [*self.values.parameters()], TAU)

        # actor: exploit in the logged state, explore in the state another policy's branch gives it, never past the bound
        share = equations.exploration_share(self.epochs_done / self.epochs)
        explore = part.mine(torch.rand(len(whole), device=self.device) < share)
        other = part.mine(torch.randint(data["counterfactual"].shape[1], (len(whole),), device=self.device))
        state = torch.where(explore[:, None], data["counterfactual"][index, other], data["b"][index])
        cloned = torch.where(explore[:, None], data["expert"][index, other], data["action"][index])
        u = self.actor(state, data["reach"][index])
        bound = self.bound(u, index)
        size = bound.detach().abs().mean()
        part.average([size])
        cloning = equations.masked_squared_error(u, cloned)
        actor_loss = -equations.behaviour_weight(size, 2.5) * bound.mean() + cloning * 0.1
        self.optimizers_[1].zero_grad()
        actor_loss.backward()
        part.average_gradients(self.actor)
        self.optimizers_[1].step()

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        index, data = self.validation, self.data
        after = data["after"][index]
        next_q = (
            self.values(data["b"][after])[..., 0].mean(0)
            + self.advantage(equations.action_features(self.actor(data["b"][after], data["reach"][after]), self.polynomial), after)[..., 0]
        )
        twins = self.values(data["b"][index])[..., 0]
        level = twins.mean(0) + self.advantage(data["phi"][index], index)[..., 0]
        error = torch.where(data["usable"][index], data["reward"][index] + data["discount"][index] * next_q - level, 0.0)
        u, (low, high) = self.actor(data["b"][index], data["reach"][index]), data["reach"][index].unbind(1)
        at_edge = torch.minimum(u - low, high - u) < AT_EDGE * (high - low)
        self.epochs_done += 1
        found = {
            "td_error": error.square(),
            "bound": self.bound(u, index),
            "level": level,
            "twin_disagreement": (twins[0] - twins[1]).abs(),
            "at_edge": at_edge.float(),  # share of proposals at the end of what the evidence reaches
        }
        self.history.append({name: float(values.mean()) for name, values in found.items()})
        if not all(map(math.isfinite, self.history[-1].values())):
            raise TrainingError(f"stage 2 diverged in epoch {self.epochs_done}: {self.history[-1]}; lower training.learning_rate")
        self.best_weights = {name: value.clone() for name, value in self.state_dict().items()}  # last step, not best: no choice by luck
        self.each_epoch(self)


def guardrail_prices(policy: Policy, at: Situation) -> np.ndarray:
    """Step 3: [M] the smallest prices at which the mean immediate value keeps each ceiling and floor, under the policy as served.

    The Lagrangian's multipliers by bisection, one guardrail after the other, twice round if there are several. One that no price can keep gets the largest
    one; the gate will refuse the model and say so.
    """
    platform = policy.platform
    prices = np.zeros(len(platform.objectives))
    guarded = [(j, bound, side) for j, o in enumerate(platform.objectives.values()) for bound, side in ((o.ceiling, 1), (o.floor, -1)) if bound is not None]

    def immediate(prices: np.ndarray) -> np.ndarray:
        priced = replace(policy, multipliers=prices)
        if policy.catalogue is not None:
            total, items = priced.item_scores(at, platform.weights, None)
            law = priced.item_law(total, at, platform.serving.exploration)
            vectors = torch.from_numpy(policy.catalogue.embedding[items]).double()
            return torch.einsum("bcm,bc->bm", priced.totals(at, vectors)[..., 1], law).mean(0).numpy()
        phi = priced.served_features(priced.best_units(at, platform.weights, *platform.bounds.T))
        return priced.totals(at, phi[:, None])[:, 0, :, 1].mean(0).numpy()

    for _ in range(min(2, len(guarded))):
        for j, bound, side in guarded:

            def kept(price: float, j: int = j, bound: float = bound, side: int = side) -> bool:
                prices[j] = side * price
                return bool(side * immediate(prices)[j] <= side * bound)

            prices[j] = side * smallest_price(kept, LARGEST_PRICE * float(np.abs(platform.weights).max()))
    return prices


def smallest_price(kept: Callable[[float], bool], largest: float) -> float:
    """The smallest price that keeps a guardrail, to a thousandth of the largest one; the largest where none does."""
    if kept(0.0):
        return 0.0
    lower, upper = 0.0, largest / 64
    while upper < largest and not kept(upper):
        lower, upper = upper, 2 * upper
    while upper - lower > largest / 1000:
        middle = (lower + upper) / 2
        lower, upper = (lower, middle) if kept(middle) else (middle, upper)
    return upper


def evidenced_reach(policy: Policy, seen: Represented, windows: Windows, rows: np.ndarray, first: float = REACHES[0]) -> float:
    """How far past what policies do the logs still tell what follows, in standard deviations of those policies' own noise.

    The farthest of `REACHES` at which the heaviest hundredth of the decisions `rows` carries at most `HEAVIEST` of all weight with which they would stand
    for this policy, as served; `UNBORNE` if there is none, for to go less far then costs value and buys no evidence. `first` is asked first, then farther
    ones while they carry no more, else nearer ones. Weights are balanced over the policies (Agarwal et al., KDD 2017), which needs each one's law and
    probability to act in the log: `REACH` where too few decisions have them, and for a catalogue, where nothing lies between items.
    """
    logged = windows.mixture(rows)
    known = np.isfinite(logged) & (logged > 0)
    if policy.catalogue is not None or known.sum() < LEAST_ROWS:
        return REACH
    chosen = np.random.default_rng(policy.platform.training.seed).permutation(np.flatnonzero(known))[:WEIGHED]
    told, logged = rows[chosen], logged[chosen]

    def borne(reach: float) -> bool | None:
        """Whether the logs bear this one; None where fastq serves without noise, and no weight tells."""
        reaching = replace(policy, details={"reach": reach})
        weight = np.sort(reaching.density(windows.action[told], reaching.best(situation_of(reaching, seen[told]))) / logged)
        if not np.isfinite(weight).all():
            return None
        return bool(0 < weight[-math.ceil(len(weight) / 100) :].sum() <= HEAVIEST * weight.sum())  # where none has any, the logs tell nothing

    place = REACHES.index(first) if first in REACHES else 0
    bears = borne(REACHES[place])
    if bears is None:
        return REACH
    if bears:
        while place > 0 and borne(REACHES[place - 1]):
            place -= 1
    else:
        return next((nearer for nearer in REACHES[place + 1 :] if borne(nearer)), UNBORNE)
    return REACHES[place]


def linear_level(policy: Policy, windows: Windows, b: np.ndarray, reward: np.ndarray, target: np.ndarray, rows: np.ndarray) -> None:
    """Start the values' linear part at the fixed point of linear temporal differences (LSTD, Bradtke & Barto 1996), in place.

    target [N, M]: reward less the effect of the logged action plus the discounted effect of the policy's next action.
    """
    x = np.concatenate([np.ones((len(b), 1)), b], 1)
    following, discounts, ridge = np.maximum(windows.following, 0), windows.platform.discounts, NUISANCE_RIDGE * 0.1
    weight, bias = policy.values.linear.weight.detach().view(-1, 2, b.shape[1]), policy.values.linear.bias.detach().view(-1, 2)
    for known, columns in known_together(target[rows]):
        told = rows[known]
        if len(told) == 0:
            continue
        here, there = x[told], x[following[told]]
        gram, now = here.T @ here, equations.ridge(here, reward[np.ix_(told, columns)], ridge)
        for discount in np.unique(discounts[columns]):
            alike = columns[discounts[columns] == discount]
            a = gram - here.T @ (windows.discount[told, alike[0], None] * there) + ridge * np.eye(len(gram))
            value = np.linalg.solve(a, here.T @ target[np.ix_(told, alike)])
            for head, solution in enumerate((value, now[:, np.isin(columns, alike)])):
                weight[alike, head] = torch.from_numpy(solution[1:].T).float()
                bias[alike, head] = torch.from_numpy(solution[0]).float()


def train(
    platform: Platform,
    windows: Windows,
    directory: Path | None = None,
    *,
    resume: bool = False,
    on_progress: Progress | None = None,
    start: Policy | None = None,
    part: Part = ALONE,
) -> Policy:
    """Learn a policy from the players who are not held out for evaluation.

    `start` is a policy of the same definition that saw fewer decisions: its encoding and units stay, its networks learn on. `directory` keeps the record
    after every epoch; with `resume` a stopped run goes on there and ends bit for bit where it would have, on the same kind of device.
    `part` is this process's, where several learn together: each is given the same logs and returns the same policy.
    Raises `TrainingError` where the logs hold nothing to learn from, a loss diverges or a CUDA device is too small.
    The preset `paper` learns afresh, whatever `start`.
    """
    training = platform.training
    held_out = held_out_players(windows.player_ids, training.holdout, training.seed)
    learning = ~held_out[windows.player]
    checking = held_out_players(windows.player_ids, 0.15, training.seed + 1)[windows.player] & learning
    if not (learning & ~checking).any():
        raise TrainingError(
            f"{len(windows.player_ids)} players and {len(windows)} decisions are too few to learn from; expected some players on each side of training.holdout"
        )
    if not checking.any():
        checking = learning
    rows, checked = np.flatnonzero(learning & ~checking), np.flatnonzero(checking)
    if not np.isfinite(windows.reward[rows]).any():
        raise TrainingError("there is nothing to learn from: no objective of any decision is known yet; outcomes have to arrive first")
    records = (directory / "representation.safetensors", directory / "learner.safetensors") if directory else (None, None)

    if start is None:
        units = Units.of(windows.action[learning], windows.catalogue is not None)
        encoding = fit_encoding(platform, windows.matrix, windows.attributes.filter(learning), windows.rows_seen(np.flatnonzero(learning)))
    else:
        units, encoding = start.units, start.encoding
    learned = np.flatnonzero(learning)
    lesson = Lesson(windows, encoding, units, rows, checked, learned, records, resume, on_progress, part)
    try:
        policy, seen, details = published(lesson) if training.preset == "paper" else orthogonal(lesson, start)
    except torch.OutOfMemoryError as error:  # a device's; where processors have none left, something else is raised
        raise TrainingError(f"the CUDA device has too little memory for {len(windows):,} decisions; set training.accelerator: cpu and train anew") from error
    whole = {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": windows.fingerprint(),
        "git": git_commit(),
        "decisions": len(windows),
        "players": len(windows.player_ids),
        "multipliers": dict(zip(platform.objectives, policy.multipliers.tolist(), strict=True)),
        "balance": balance_probe(windows, seen, np.flatnonzero(~learning) if held_out.sum() >= LEAST_PROBED else learned, training.seed),
    }
    return replace(policy, details=whole | details)


def published(lesson: Lesson) -> tuple[Policy, Represented, dict[str, Any]]:
    """The preset `paper`: see `fastq.paper`. It has no effects, no covariance and no prices."""
    windows, platform = lesson.windows, lesson.windows.platform
    m, s, p = len(platform.objectives), 1, equations.feature_count(windows.action.shape[1], windows.catalogue is None)
    nothing = np.zeros((0, 0))
    made = functools.partial(
        paper.PaperPolicy,
        platform=platform,
        encoding=lesson.encoding,
        catalogue=windows.catalogue,
        policies=windows.policies,
        units=lesson.units,
        effects=np.zeros((m, 2, s, p)),
        covariance=np.zeros((m, m, s * p, s * p)),
        multipliers=np.zeros(m),
        reference=Reference(nothing, [], [], nothing),
    )
    policy, states, history = paper.learn(lesson, made)
    seen = represent(policy.network, states)
    policy.network.cpu()  # where it learned; the rest of the policy is there already
    policy = replace(policy, reference=reference_rows(windows, seen, lesson.learned, platform.training.seed))
    sample = np.random.default_rng(platform.training.seed).permutation(lesson.learned)[:GUARDRAIL_SAMPLE]
    return policy, seen, {"own_response": {"usual": usual_doubt(policy, situation_of(policy, seen[sample]))}, "history": history}


def orthogonal(lesson: Lesson, start: Policy | None) -> tuple[Policy, Represented, dict[str, Any]]:
    """The preset `default`, steps 1 to 5: the policy, what stage 1 says of every decision, and what the bundle tells of both."""
    windows, encoding, units, learned = lesson.windows, lesson.encoding, lesson.units, lesson.learned
    platform = windows.platform
    training = platform.training
    network, states, history = train_representation(
        windows,
        encoding,
        units,
        lesson.rows,
        lesson.checked,
        record=lesson.records[0],
        resume=lesson.resume,
        on_progress=lesson.on_progress,
        start=start.network if start else None,
        part=lesson.part,
    )
    seen = represent(network, states)

    features = equations.action_features(torch.from_numpy(units.standard(windows.action)), windows.catalogue is None).numpy()
    critic = orthogonal_critic(windows, seen, features, histories(network, states, learned), learned, training.seed)

    scale = np.nan_to_num(np.nanstd(windows.reward[learned], 0), nan=1.0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    torch.manual_seed(training.seed)
    sizes = network.sizes
    policy = Policy(
        platform=platform,
        encoding=encoding,
        catalogue=windows.catalogue,
        policies=windows.policies,
        units=units,
        network=network,
        values=Values(sizes),
        actor=Actor(sizes),
        effects=critic.effects,
        covariance=critic.covariance,
        spread=critic.spread,
        multipliers=np.zeros(len(platform.objectives)),
        scale=scale,
        reference=reference_rows(windows, seen, learned, training.seed),
    )
    if start is not None:
        policy.actor.load_state_dict(start.actor.state_dict())
    policy = replace(policy, details={"reach": evidenced_reach(policy, seen, windows, learned, start.farthest if start else REACHES[0])})
    sample = np.random.default_rng(training.seed).permutation(learned)[:GUARDRAIL_SAMPLE]
    b, reward = seen.b.numpy().astype(float), windows.reward / scale
    if any(o.ceiling is not None or o.floor is not None for o in platform.objectives.values()):
        linear_level(policy, windows, b, reward, np.where(windows.open_ended, np.nan, reward), learned)  # prices ask for immediate values alone
        policy = replace(policy, multipliers=guardrail_prices(policy, situation_of(policy, seen[sample])))
    targets = level_targets(policy, seen, windows, features, scale, learned)
    linear_level(policy, windows, b, reward, targets, learned)

    data, device = stage_two_data(policy, seen, network, states, windows, features, scale, learned), states.mean.device
    network.cpu()  # where it learned; the rest of the policy is there already
    module = ValueAndActor(
        policy,
        {name: tensor.to(device) for name, tensor in data.items()},
        torch.from_numpy(lesson.checked).to(device),
        seed=training.seed,
        epochs=min(training.epochs, LEVEL_EPOCHS if start is None else WARM_EPOCHS),
        learning_rate=training.learning_rate,
        part=lesson.part,
    ).to(device)
    fit(
        module,
        torch.from_numpy(lesson.rows),
        training.batch_size,
        EachEpoch("value and actor", lesson.records[1], PATIENCE if start is None else WARM_PATIENCE, lesson.on_progress, lesson.part),
        resume=lesson.resume,
    )
    module.load_state_dict(module.best_weights)
    for part in (policy.values, policy.actor):
        part.eval().requires_grad_(False)
    if any(o.ceiling is not None or o.floor is not None for o in platform.objectives.values()):
        policy = replace(policy, multipliers=guardrail_prices(policy, situation_of(policy, seen[sample])))
    policy = replace(policy, details=policy.details | {"own_response": critic.own_response})
    return (
        policy,
        seen,
        policy.details
        | {
            "own_response": critic.own_response | {"usual": usual_doubt(policy, situation_of(policy, seen[sample]))},
            "level_variance": level_variance(policy, seen, windows, targets, scale, learned),
            "diagnostics": diagnostics(policy, seen, windows, features, lesson.checked) | {"policies_compared": critic.compared},
            "confirmed": {
                name: dict(zip(("value", "immediate", "gain", "immediate_gain"), [*critic.confirmed[j].tolist(), *critic.gain[j].tolist()], strict=True))
                for j, name in enumerate(platform.objectives)
            },
            "history": {"representation": history, "value_and_actor": module.history},
        },
    )


@torch.no_grad()
def diagnostics(policy: Policy, seen: Represented, windows: Windows, features: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """What a training is judged by when it is done, on players it did not learn from (`rows`): plain names and numbers, for a chart of many runs.

    value/OBJECTIVE is the mean value of the logged action; returned/OBJECTIVE that of what followed in the log, discounted, over so many decisions that at
    most `TAIL` of the sum is left to the value of the state reached (fewer where the log is shorter); correlation/OBJECTIVE says whether they agree player by
    player. The value is that of fastq acting from the next decision on, so it should lie above what the behaviour policies returned, not beside it.
    at_bounds/DIMENSION: share of the best actions that lie on a bound of the platform; twin_disagreement: between the twins, weighted.
    """
    platform = policy.platform
    level = (policy.values(seen.b).mean(0)[..., 0].double() * torch.from_numpy(policy.scale)).numpy()
    largest = float(platform.discounts.max())
    needed = 1 if largest == 0 else math.ceil(math.log(TAIL) / math.log(largest))
    longest = int(np.bincount(windows.player[rows]).max()) if len(rows) else 1
    steps = max(min(needed, longest // 2), 1)
    returned = equations.horizon_return(windows.reward, windows.discount, windows.following, windows.open_ended, level, steps)[rows]
    told = evenly(rows[np.isfinite(returned).all(1) & np.isfinite(features[rows]).all(1)], LOOKED_AT)
    answer: dict[str, float] = {"compared_decisions": len(told), "compared_horizon": steps}
    if len(told):
        at = policy.situation_of(seen[told])
        value = policy.totals(at, torch.from_numpy(features[told])[:, None].double())[:, 0, :, 0].numpy()
        followed = returned[np.isin(rows, told)]
        for j, name in enumerate(platform.objectives):
            answer |= {f"value/{name}": float(value[:, j].mean()), f"returned/{name}": float(followed[:, j].mean())}
            if value[:, j].std() > 0 and followed[:, j].std() > 0:
                answer[f"correlation/{name}"] = float(np.corrcoef(value[:, j], followed[:, j])[0, 1])
        answer["twin_disagreement"] = float((at.disagreement @ torch.from_numpy(np.abs(platform.weights))).mean())
    sample = evenly(rows, GUARDRAIL_SAMPLE)
    if policy.catalogue is None and len(sample):
        low, high = platform.bounds.T
        best = policy.best(policy.situation_of(seen[sample]))
        on_bound = np.minimum(best - low, high - best) < AT_EDGE * (high - low)
        answer |= {f"at_bounds/{name}": float(share) for name, share in zip(platform.dimension_names, on_bound.mean(0), strict=True)}
    return answer


@torch.no_grad()
def situation_of(policy: Policy, seen: Represented) -> Situation:
    """The critic's view of these decisions, without gradients."""
    return policy.situation_of(seen)


def evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int)]


def best_features(policy: Policy, at: Situation) -> Tensor:
    """[N, P] expected action features of the policy as it would be served in every state."""
    if policy.catalogue is None:
        return policy.served_features(torch.from_numpy(policy.units.standard(policy.best(at))))
    parts, w = [], policy.platform.weights
    for start in range(0, len(at), 2048):
        piece = at[start : start + 2048]
        total, items = policy.item_scores(piece, w, None)
        law = policy.item_law(total, piece, policy.platform.serving.exploration)
        parts.append(torch.einsum("bc,bcp->bp", law, torch.from_numpy(policy.catalogue.embedding[items]).double()))
    return torch.cat(parts)


@torch.no_grad()
def looked_at(policy: Policy, seen: Represented, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Situation]]:
    """The critic's view of decisions, a piece at a time: of all at once it would be many times what they were learned from."""
    for start in range(0, len(rows), LOOKED_AT):
        piece = rows[start : start + LOOKED_AT]
        yield piece, policy.situation_of(seen[piece])


def level_targets(policy: Policy, seen: Represented, windows: Windows, features: np.ndarray, scale: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[N, M] reward less the effect of the logged action plus the discounted effect of the policy's next one, in networks' units; NaN but for the decisions
    `rows`, all of some players.
    """
    effect, logged = np.zeros_like(windows.reward), np.full_like(windows.reward, np.nan)
    for piece, at in looked_at(policy, seen, rows):
        effect[piece] = torch.einsum("bmp,bp->bm", at.slope[:, :, 0], best_features(policy, at) - at.reference).numpy()
        logged[piece] = torch.einsum("bmp,bp->bm", at.slope[:, :, 0], torch.from_numpy(np.nan_to_num(features[piece])) - at.reference).numpy()
    following = np.maximum(windows.following, 0)
    return np.where(windows.open_ended, np.nan, (windows.reward - logged + windows.discount * effect[following]) / scale)


@torch.no_grad()
def stage_two_data(
    policy: Policy, seen: Represented, network: Any, states: Any, windows: Windows, features: np.ndarray, scale: np.ndarray, learned: np.ndarray
) -> dict[str, Tensor]:
    """What a stage-2 step gathers from, worked out once: states, counterfactual states, rewards; and, for all decisions the same, effects and their doubt.

    Of the decisions `learned` alone; where the others stand is left empty, so that a decision keeps its number.
    """
    usable = np.isfinite(windows.reward) & ~windows.open_ended & np.isfinite(features).all(1)[:, None]
    weights = torch.from_numpy(policy.platform.weights)
    prices = torch.stack([weights, -torch.from_numpy(policy.multipliers)], 1)  # [M, 2] of the value and of the immediate value
    size, k, d, found = 0.0, len(windows.policies), windows.action.shape[1], dict[str, Tensor]()
    for rows, at in looked_at(policy, seen, learned):
        hidden = network.experts(network.encoder(*states.gather(torch.from_numpy(rows))[:2]))[0]
        piece = {
            "counterfactual": torch.stack([network.balance(hidden[:, branch]) for branch in range(k)], 1),
            "expert": at.expected[..., :d],
            "reference": at.reference,
            "reach": at.reach,
            "priced": torch.einsum("mt,bmtp->bp", prices, at.slope),
        }
        found = found or {name: torch.zeros(len(seen.b), *values.shape[1:]) for name, values in piece.items()}
        for name, values in piece.items():
            found[name][rows] = values.float().cpu()
        size += float(torch.einsum("m,bmp->bp", weights, at.slope[:, :, 0]).abs().sum())
    unit = max(size / max(len(learned) * features.shape[1], 1), 1e-9)

    def tensor(array: Any) -> Tensor:
        return torch.as_tensor(array).float()

    return {
        "b": seen.b,
        "psi": seen.psi,
        "effects": tensor(policy.effects / scale[:, None, None, None]),
        "doubt": tensor(policy._joint / unit**2),  # noqa: SLF001 - of the weights that it is trained for
        "phi": tensor(np.nan_to_num(features)),
        "action": tensor(policy.units.standard(windows.action)),
        **found,
        "priced": found["priced"] / unit,
        "reward": torch.nan_to_num(tensor(windows.reward / scale)),
        "discount": tensor(windows.discount),
        "usable": torch.from_numpy(usable),
        "after": torch.from_numpy(np.maximum(windows.following, 0)),
        "weight": tensor(policy.platform.weights * scale),
    }


def level_variance(policy: Policy, seen: Represented, windows: Windows, targets: np.ndarray, scale: np.ndarray, rows: np.ndarray) -> float:
    """Variance of the weighted level's estimate: the Bellman residuals' mean over players, as a cluster-robust standard error squared."""
    with torch.no_grad():
        level = policy.values(seen.b).mean(0)[..., 0].double().numpy()
    following = np.maximum(windows.following, 0)
    residual = ((targets + windows.discount * level[following] - level) * scale) @ policy.platform.weights
    known = rows[np.isfinite(residual[rows])]
    sums = np.bincount(windows.player[known], residual[known])
    return float((sums**2).sum() / max(len(known), 1) ** 2 / (1 - policy.platform.discounts.max()) ** 2)


def usual_doubt(policy: Policy, at: Situation) -> float:
    """What is usually not known of the difference between what the two policies do that act most in a state (of a single one: between it and the policy's
    own action): a standard deviation, median over states.
    """
    order, experts, rows = np.argsort(-policy.policy_probability(at), 1), policy.expert_actions(at), np.arange(len(at))
    other = experts[rows, order[:, 1]] if len(policy.policies) > 1 else policy.best(at)
    return float(np.median(policy.doubt(at, experts[rows, order[:, 0]][:, None], other[:, None])))


def balance_probe(windows: Windows, seen: Represented, rows: np.ndarray, seed: int) -> dict[str, float]:
    """How much of the acting policy is left in the balanced state, on players that training never saw: `rows`.

    probe: balanced accuracy of a fresh classifier on players that it was not fitted on, against `chance`; mmd: the largest discrepancy between two policies'
    states (`equations.discrepancy`), of at most MMD_ROWS each.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    if len(windows.policies) < 2:
        return {"probe": 1.0, "chance": 1.0, "mmd": 0.0}
    sample = np.random.default_rng(seed).permutation(rows)[:20_000]
    train_on = player_folds(windows.player, seed)[sample] > 0
    b, label = seen.b[torch.from_numpy(sample)], windows.policy[sample]
    samples = [b[label == k][:MMD_ROWS] for k in np.unique(label)]
    pairs = [(x, y) for i, x in enumerate(samples) for y in samples[:i]]
    width = max(float(torch.pdist(torch.cat(samples)).median()), 1e-9) if len(b) > 1 else 1.0
    answer = {"chance": 1.0 / len(windows.policies), "mmd": max((float(equations.discrepancy(x, y, width)) for x, y in pairs), default=0.0)}
    if len(np.unique(label[train_on])) < 2 or train_on.all():
        return answer | {"probe": 1.0}
    probe = LogisticRegression(max_iter=300, class_weight="balanced").fit(b.numpy()[train_on], label[train_on])
    return answer | {"probe": float(balanced_accuracy_score(label[~train_on], probe.predict(b.numpy()[~train_on])))}


def reference_rows(windows: Windows, seen: Represented, rows: np.ndarray, seed: int) -> Reference:
    """A sample of logged decisions that explanations may name as nearest."""
    kept = np.sort(np.random.default_rng(seed).permutation(rows)[:REFERENCE_ROWS])
    return Reference(seen.b.numpy()[kept], [windows.decision_id[i] for i in kept], [windows.policies[windows.policy[i]] for i in kept], windows.action[kept])


def git_commit() -> str | None:
    """The commit this code runs from, if it runs from a checkout."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
