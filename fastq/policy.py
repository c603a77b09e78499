"""`Policy`: recommend with a propensity, in raw units; all that serving needs, and what a bundle holds.

The critic of an action is exact arithmetic on what the networks say of the state: per objective a level (the value of what the
behaviour policies would do here on average) plus an effect that is linear in the action's features. Hundreds of candidates are
scored for the price of one, parts add up by construction, and the doubt of a difference is a quadratic form.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from safetensors.numpy import load_file, save_file
from scipy.special import ndtr, ndtri
from torch import Tensor

from fastq import features, forward
from fastq.equations import action_features, expected_features
from fastq.errors import BundleError, RequestError
from fastq.features import Catalogue, Encoding, PlayerStates, Units
from fastq.networks import Actor, Representation, Represented, Sizes, Values
from fastq.platform import Platform, platform_from_tree

if TYPE_CHECKING:
    from fastq.explanation import Explanation

BLOCK = 64  # states whose candidates are met at a time when answering: they fit the processor's cache
ROUNDS = ((64, 1.0), (32, 0.15), (16, 0.04))  # candidates per round, and the share of the evidence's reach over which they are spread
CHUNKS = (4, 8, 16, 32, 64, 512, 4096)  # states per batch: a row's floats depend on the size of its batch and its place there, so sizes are fixed
NEAREST_ITEMS = 512  # items of a large catalogue that are re-ranked
REACH = 1.0  # how far, in standard deviations of a behaviour policy's own noise, an action may lie from the nearest one that acts, where logs cannot say
CAUTION, CAUTION_AMONG_ITEMS = 0.5, 8.0  # where no reach bounds how far one may go, doubt has to; measured in infra/log.md
OUTSIDE = 1e3  # what one standard deviation beyond the reach costs an action's total: more than any value
RARE = 0.05  # a policy that acts in less than this share of such states is no evidence there
NEIGHBOURS = 5  # logged decisions that count as the nearest
SAMPLED = 256  # logged decisions from which the usual distance between neighbours is read
LEAST = 1e-6  # share of a dimension's range below which noise, or what limits leave, is too narrow for a density: floats are a grid of their own there
UNIFORM_SHARE = 0.05  # floor of a catalogue's law, spread over the eligible items


@dataclass(frozen=True)
class Recommendation:
    """What is recommended to B players; NaN marks a propensity that does not exist.

    action [B, D] raw units, or [B] item ids; value [B] and by_objective [B, M] of that action; propensity [B] density per raw units, or
    probability; mean [B, D] the noise-free action (item ids for a catalogue); seeds [B] uint64, from which the noise is drawn again;
    slots [B, 2] the size of the batch that a row was computed in and its place there, without which its floats cannot be had again bit for bit;
    ranking: per player the `top_k` items, first the recommended one.
    """

    action: np.ndarray
    value: np.ndarray
    by_objective: np.ndarray
    propensity: np.ndarray
    mean: np.ndarray
    seeds: np.ndarray
    slots: np.ndarray
    ranking: list[list[str]] | None = None

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, rows: slice) -> Recommendation:
        ranking = None if self.ranking is None else self.ranking[rows]
        return Recommendation(**{name: getattr(self, name)[rows] for name in _DRAWN}, ranking=ranking)


_DRAWN = ("action", "value", "by_objective", "propensity", "mean", "seeds", "slots")  # what a recommendation has for each row


@dataclass(frozen=True)
class Reference:
    """Logged decisions kept in the bundle, so that an explanation can name the nearest ones."""

    embedding: np.ndarray  # [R, Z] float32
    decision_id: list[str]
    policy: list[str]
    action: np.ndarray  # [R, D] raw units or item embeddings

    @functools.cached_property
    def standard(self) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """Mean [Z] and width [Z] of the embeddings, and the embeddings [R, Z] in these units."""
        centre, width = self.embedding.mean(0), np.maximum(self.embedding.std(0), 1e-6)
        return centre, width, torch.from_numpy((self.embedding - centre) / width)

    @functools.cached_property
    def usual(self) -> float:
        """The usual distance of a logged decision to its NEIGHBOURS nearest others, in the same units; read from a sample. NaN where there are none."""
        standard = self.standard[2]
        if len(standard) < 2:
            return float("nan")
        sample = standard[torch.linspace(0, len(standard) - 1, min(SAMPLED, len(standard))).round().long()]
        among = torch.cdist(sample, standard).topk(min(NEIGHBOURS, len(standard) - 1) + 1, largest=False).values[:, 1:]  # the nearest of all is itself
        return max(float(among.mean(1).median()), 1e-9)


@dataclass(frozen=True)
class Encoded:
    """States as the networks' inputs: x [B, W, 2F] standardised values then presence marks, v [B, G], branch [B, K]."""

    x: Tensor
    v: Tensor
    branch: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | np.ndarray) -> Encoded:
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows)
        return Encoded(self.x[index], self.v[index], self.branch[index])

    def padded(self, size: int) -> Encoded:
        """`size` rows: these, then the first one again and again."""
        n = len(self)
        return self if n == size else Encoded(*(torch.cat([part, part[:1].expand(size - n, *part.shape[1:])]) for part in (self.x, self.v, self.branch)))


@dataclass(frozen=True)
class Situation:
    """What the critic needs of B states, float64: everything about an action follows by small matrix products."""

    b: Tensor  # [B, Z] balanced state
    level: Tensor  # [B, M, 2] value and immediate value of the reference action
    disagreement: Tensor  # [B, M] between the twins
    slope: Tensor  # [B, M, 2, P] of the value and of the immediate value, per action feature
    psi: Tensor  # [B, S]
    reference: Tensor  # [B, P] what the behaviour policies do here on average, as action features
    expected: Tensor  # [B, K, P] what each of them does
    assignment: Tensor  # [B, K] probability that each of them acts in such a state
    proposal: Tensor  # [B, D] the actor's
    reach: Tensor  # [B, 2, D] lowest and highest action that the evidence reaches, standard units

    def __len__(self) -> int:
        return len(self.b)

    def __getitem__(self, rows: slice | np.ndarray) -> Situation:
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows)
        return Situation(**{name: getattr(self, name)[index] for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class Policy:
    """A trained policy. Made by `fastq.learner`, loaded by `fastq.load_policy`; immutable."""

    platform: Platform
    encoding: Encoding
    catalogue: Catalogue | None
    policies: list[str]  # the behaviour policies that were learned from, in the order of the expert branches
    units: Units
    network: Representation
    values: Values
    actor: Actor
    effects: np.ndarray  # [M, 2, S, P] of the value and of the immediate value, in the objectives' units
    covariance: np.ndarray  # [M, M, S * P, S * P] of the value's effects, objectives jointly
    spread: np.ndarray  # [K, D] standard deviation of each behaviour policy's own noise, standard units
    multipliers: np.ndarray  # [M] price of the guardrails, per unit of each objective's immediate value
    scale: np.ndarray  # [M] unit in which the networks work
    reference: Reference
    details: dict[str, Any] = field(default_factory=dict)  # created_at, git commit, data fingerprint, diagnostics: plain JSON
    version: str | None = None

    @staticmethod
    def networks(sizes: Sizes) -> tuple[Any, Any, Any]:
        """What `network`, `values` and `actor` are, untrained."""
        return Representation(sizes), Values(sizes), Actor(sizes)

    # ---- states --------------------------------------------------------------------------------------------------------
    @property
    def fingerprint(self) -> str:
        """Of the features it was made for; serving refuses a bundle whose fingerprint is not its own."""
        return features.fingerprint(self.platform)

    @property
    def polynomial(self) -> bool:
        return self.catalogue is None

    def encode(self, states: PlayerStates) -> Encoded:
        """States in raw units to the networks' inputs; raises `RequestError` that names what has the wrong shape."""
        raw = features.raw_windows(self.platform, states, len(self.encoding.mean))
        attributes = self.encoding.attributes(features.attribute_frame(self.platform, states), len(raw))
        names = list(states.policies) if states.policies is not None else [None] * len(raw)
        if len(names) != len(raw):
            raise RequestError(f"policies: expected {len(raw)} names, one per player of history, got {len(names)}")
        places, branches = self._branches
        branch = branches[[places.get(name, -1) for name in names]]
        return Encoded(torch.from_numpy(self.encoding.rows(raw)), torch.from_numpy(attributes), torch.from_numpy(branch))

    @functools.cached_property
    def _branches(self) -> tuple[dict[str | None, int], np.ndarray]:
        """The policies' places, and the weights [K + 1, K] over the expert branches for each that acted last; the last row for none or another."""
        k = len(self.policies)
        return {name: place for place, name in enumerate(self.policies)}, np.concatenate([np.eye(k), np.full((1, k), 1 / k)]).astype(np.float32)

    def situation(self, enc: Encoded) -> Situation:
        """What the critic needs of these states; differentiable with respect to `enc.x`."""
        return self.situation_of(self.network(enc.x, enc.v, enc.branch))

    def situation_of(self, seen: Represented) -> Situation:
        """The critic's view of states that stage 1 has represented already."""
        heads = self.values(seen.b).double() * torch.from_numpy(self.scale)[:, None]
        psi, expected = seen.psi.double(), seen.expected.double()
        assignment = torch.softmax(seen.assignment.double(), -1)
        slope = torch.einsum("bs,mtsp->bmtp", psi, torch.from_numpy(self.effects))
        reach = self.reach(expected, assignment)
        return Situation(
            b=seen.b,
            level=heads.mean(0),
            disagreement=(heads[0] - heads[1])[..., 0].abs(),
            slope=slope,
            psi=psi,
            reference=torch.einsum("bk,bkp->bp", assignment, expected),
            expected=expected,
            assignment=assignment,
            proposal=self.actor(seen.b, reach.float()).double(),
            reach=reach,
        )

    @property
    def caution(self) -> float:
        """Standard deviations of doubt that an action's total is lessened by."""
        given = self.platform.training.caution
        return given if given is not None else CAUTION if self.catalogue is None else CAUTION_AMONG_ITEMS

    @property
    def farthest(self) -> float:
        """How far an action may lie from the nearest policy that acts, in standard deviations of its own noise: what `fastq.learner.evidenced_reach` found."""
        return float(self.details.get("reach", REACH))

    def reach(self, expected: Tensor, assignment: Tensor) -> Tensor:
        """[B, 2, D] how far evidence reaches: `farthest` standard deviations of their own noise past what the policies that act in such a state do,
        inside the platform's bounds.

        A local model of the effects is trusted between the policies and a little past them; outside it would extrapolate.
        """
        d, spread = self.spread.shape[1], torch.from_numpy(self.spread).to(expected)
        acts = acting(assignment)[..., None]
        low = torch.where(acts, expected[..., :d] - self.farthest * spread, torch.inf).amin(1)
        high = torch.where(acts, expected[..., :d] + self.farthest * spread, -torch.inf).amax(1)
        edges = torch.stack([low, high], 1)
        if len(self.platform.bounds) == 0:
            return edges
        lowest, highest = (torch.from_numpy(self.units.standard(edge)).to(edges) for edge in self.platform.bounds.T)
        return torch.minimum(torch.maximum(edges, lowest), highest)

    @functools.cached_property
    def _frozen(self) -> forward.Weights:
        return forward.weights_of(
            self.network,
            self.values,
            self.actor,
            effects=self.effects,
            joint=self._joint.numpy(),
            scale=self.scale,
            spread=self.spread,
            reach=self.farthest,
            rare=RARE,
            bounds=self.units.standard(self.platform.bounds.T) if len(self.platform.bounds) else np.zeros((2, 0)),
        )

    def look(self, enc: Encoded) -> Situation:
        """`situation` for answers: without gradients, several times faster for few states, and equal to it but for float32 rounding."""
        return Situation(*map(torch.from_numpy, forward.look(self._frozen, enc.x.numpy(), enc.v.numpy(), enc.branch.numpy())))

    def _search(self, at: Situation, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """`best_units` for answers, under the platform's own weights."""
        edges = self.units.standard(low), self.units.standard(high)
        weights, caution = np.stack([self.platform.weights, self.multipliers]), self.caution
        found = [
            forward.best(self._frozen, piece, weights, caution, edges, [(_columns(piece.proposal.shape[1], n), share) for n, share in ROUNDS], OUTSIDE)
            for start in range(0, len(at), BLOCK)
            for piece in (at[start : start + BLOCK] if len(at) > BLOCK else at,)
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def situations(self, enc: Encoded | Situation) -> Situation:
        """`situation` in padded batches of fixed sizes, without gradients; what was found already is given back, so one look can answer many questions."""
        if isinstance(enc, Situation):
            return enc
        if len(enc) == 0:
            raise RequestError("expected at least one state")
        parts = [self.look(enc[start : start + n].padded(size))[:n] for start, n, size in pieces(len(enc))]
        return parts[0] if len(parts) == 1 else Situation(**{name: torch.cat([getattr(p, name) for p in parts]) for name in parts[0].__dataclass_fields__})

    # ---- actions as features --------------------------------------------------------------------------------------------
    def _units(self, action: np.ndarray) -> Tensor:
        """Actions in raw units, or item embeddings, as tensors in standard units."""
        return torch.from_numpy(np.ascontiguousarray(self.units.standard(np.asarray(action, float))))

    def as_actions(self, given: Sequence[str] | np.ndarray) -> np.ndarray:
        """Item ids as embeddings [..., D]; numeric actions pass through. Raises `RequestError` for an item the catalogue does not hold."""
        array = np.asarray(given)
        if self.catalogue is None or array.dtype.kind == "f":
            return array.astype(float)
        positions = self.catalogue.positions(array.reshape(-1).tolist())
        if (positions < 0).any():
            raise RequestError(f"item_id: {array.reshape(-1)[positions < 0][0]!r} is not in the catalogue")
        return self.catalogue.embedding[positions].reshape(*array.shape, -1).astype(float)

    # ---- the critic -----------------------------------------------------------------------------------------------------
    def totals(self, at: Situation, phi: Tensor) -> Tensor:
        """[B, C, M, 2] value and immediate value of candidates given by their features [B, C, P]."""
        return at.level[:, None] + torch.einsum("bmtp,bcp->bcmt", at.slope, phi - at.reference[:, None])

    def _weights(self, weights: Mapping[str, float] | None) -> np.ndarray:
        if not weights:
            return self.platform.weights
        names = list(self.platform.objectives)
        if unknown := [name for name in weights if name not in names]:
            raise RequestError(f"weights: {unknown[0]!r} is no objective; expected {', '.join(names)}")
        return np.array([weights.get(name, w) for name, w in zip(names, self.platform.weights, strict=True)], float)

    def _joint_covariance(self, w: np.ndarray) -> Tensor:
        """[S * P, S * P] covariance of the weighted value's effects."""
        return torch.from_numpy(np.tensordot(np.multiply.outer(w, w), self.covariance, 2))

    @functools.cached_property
    def _joint(self) -> Tensor:
        """Of the platform's own weights, which nearly every call asks for."""
        return self._joint_covariance(self.platform.weights)

    def shape_of_doubt(self, at: Situation, w: np.ndarray) -> Tensor:
        """[B, P, P] covariance of the weighted value per pair of action features, in these states."""
        usual = w is self.platform.weights
        kept = at.__dict__.get("_shape") if usual else None  # one look at states is asked for it by each question about them
        if kept is not None and kept[0] is self:
            return kept[1]
        s = at.psi.shape[1]
        joint = (self._joint if usual else self._joint_covariance(w)).view(s, -1, s, self.covariance.shape[2] // s)
        left = torch.einsum("bs,sptq->bptq", at.psi, joint)
        shape = torch.einsum("bptq,bt->bpq", left, at.psi)
        if usual:
            at.__dict__["_shape"] = (self, shape)
        return shape

    def _scores(self, at: Situation, phi: Tensor, w: np.ndarray, doubt: Tensor) -> dict[str, Tensor]:
        """What ranks candidates [B, C, P]: value - caution - guardrail = total, each [B, C]."""
        difference = phi - at.reference[:, None]
        prices = torch.from_numpy(np.stack([w, self.multipliers]))  # of the value, and of the immediate value
        level, slope = torch.einsum("bmt,tm->bt", at.level, prices), torch.einsum("bmtp,tm->bpt", at.slope, prices)
        value, guardrail = (level[:, None] + difference @ slope).unbind(-1)  # weighted before candidates are met, which are many
        variance = ((difference @ doubt) * difference) @ difference.new_ones(difference.shape[-1])  # so short a sum is quicker as a product
        caution = self.caution * variance.clamp(min=0).sqrt()
        return {"value": value, "caution": caution, "guardrail": guardrail, "total": value - caution - guardrail}

    def best_units(self, at: Situation, w: np.ndarray, low: np.ndarray, high: np.ndarray) -> Tensor:
        """[B, D] the candidate with the largest total inside `low`..`high` (raw units) and the evidence's reach, in standard units.

        What the networks propose, then ever finer rounds of fixed directions around the best so far: a function of state and model alone.
        """
        if at.b.shape[0] > CHUNKS[-1]:  # so that the candidates of a large batch need not all be in memory at once
            return torch.cat([self.best_units(at[start : start + CHUNKS[-1]], w, low, high) for start in range(0, len(at), CHUNKS[-1])])
        doubt, d = self.shape_of_doubt(at, w), at.proposal.shape[1]
        allowed = [torch.from_numpy(self.units.standard(edge)) for edge in (low, high)]
        lowest, highest = (torch.minimum(torch.maximum(edge, allowed[0]), allowed[1]) for edge in at.reach[:, :, None].unbind(1))
        tried = torch.cat([at.proposal[:, None], at.reference[:, None, :d], at.expected[:, :, :d]], 1)
        best = (lowest + highest) / 2
        for n, share in ROUNDS:
            directions = torch.from_numpy(_directions(d, n)) * share / 2
            tried = torch.cat([best, tried, best + directions * (highest - lowest)], 1)
            tried = torch.minimum(torch.maximum(tried, lowest), highest)
            total = self._scores(at, action_features(tried, True), w, doubt)["total"]
            total = total - OUTSIDE * (self._distance(at, tried) - self.farthest).clamp(min=0)
            best = tried.gather(1, total.argmax(1)[:, None, None].expand(-1, 1, d))
            tried = best
        return best.squeeze(1)

    def _distance(self, at: Situation, u: Tensor) -> Tensor:
        """[B, C] distance of candidates [B, C, D] to the nearest policy that acts in such a state, in standard deviations of its own noise."""
        d, spread = u.shape[-1], torch.from_numpy(np.maximum(self.spread, 1e-6))
        apart = torch.zeros(*u.shape[:2], len(spread), dtype=u.dtype, device=u.device)
        for i in range(d):  # few and short: a sum over the last axis would take longer
            apart += ((u[:, :, None, i] - at.expected[:, None, :, i]) / spread[:, i]).square()
        return torch.where(acting(at.assignment)[:, None], apart, torch.inf).amin(-1).sqrt()

    def served_features(self, mean: Tensor) -> Tensor:
        """[B, P] expected action features under the law that is served around `mean` [B, D] (standard units)."""
        sd, left, right = (
            torch.from_numpy(edge / self.units.width)
            for edge in self.law(self.platform.bounds[:, 0], self.platform.bounds[:, 1], self.platform.serving.exploration)
        )
        if float(sd.max()) == 0:
            return action_features(mean, self.polynomial)
        shift = torch.from_numpy(self.units.centre / self.units.width)
        return expected_features(mean, sd, left - shift, right - shift)

    # ---- what explanations ask -------------------------------------------------------------------------------------------
    def parts(self, enc: Encoded | Situation, actions: np.ndarray) -> np.ndarray:
        """[B, C, M, 2] immediate and long-term parts of actions [B, C, D], unweighted, in each objective's unit; their sum is the value."""
        totals = self.totals(self.situations(enc), action_features(self._units(actions), self.polynomial)).numpy()
        return np.stack([totals[..., 1], totals[..., 0] - totals[..., 1]], -1)

    def value(self, enc: Encoded, actions: Tensor) -> Tensor:
        """[B] weighted value of actions [B, D] in raw units; differentiable with respect to `enc.x`. Of a situation only what the value rests on."""
        seen, w = self.network(enc.x, enc.v, enc.branch), self.platform.weights
        level = self.values(seen.b).double().mean(0)[..., 0] @ torch.from_numpy(w * self.scale)
        slope = seen.psi.double() @ torch.from_numpy(np.tensordot(w, self.effects[:, 0], 1))
        reference = (torch.softmax(seen.assignment.double(), -1)[..., None] * seen.expected.double()).sum(1)
        phi = action_features(self._units(actions.detach().cpu().numpy()), self.polynomial)
        value: Tensor = level + ((phi - reference) * slope).sum(-1)
        return value

    def value_seen(self, enc: Encoded, actions: np.ndarray) -> np.ndarray:
        """[B] the same without gradients and for less, but for float32 rounding."""
        with torch.inference_mode():
            totals = self.totals(self.look(enc), action_features(self._units(actions), self.polynomial)[:, None])
        weighted: np.ndarray = totals[:, 0, :, 0].numpy() @ self.platform.weights
        return weighted

    def doubt(
        self, enc: Encoded | Situation, actions: np.ndarray, reference: np.ndarray | None = None, weights: Mapping[str, float] | None = None
    ) -> np.ndarray:
        """[B, C] standard deviation of the weighted value of actions [B, C, D], or of their difference to `reference` [B, C, D].

        Without a reference the doubt about the level (the twins' disagreement) is added to that about the effect. Beside the doubt of the effects that people
        share stands how differently those who look alike respond, which grows with the distance between the two actions.
        """
        at, w = self.situations(enc), self._weights(weights)
        phi = action_features(self._units(actions), self.polynomial)
        other = at.reference[:, None] if reference is None else action_features(self._units(reference), self.polynomial)
        variance = torch.einsum("bcp,bpq,bcq->bc", phi - other, self.shape_of_doubt(at, w), phi - other).clamp(min=0)
        variance = variance + self._own_response(w, (phi - other)[..., : len(self.units.centre)])
        if reference is None:
            variance = variance + ((at.disagreement @ torch.from_numpy(np.abs(w))) ** 2)[:, None] + self.details.get("level_variance", 0.0)
        return variance.sqrt().numpy()

    def _own_response(self, w: np.ndarray, apart: Tensor) -> Tensor:
        """[B, C] variance of how differently people who look alike respond to actions that are `apart` [B, C, D], in standard units.

        `fastq.learner.own_response` says how it starts, by dimension (older bundles: one share for all). It ends at one decision's stake, since squares of
        distances have no end and responses have. 0 for bundles from before it was asked.
        """
        own, most = self.details.get("own_response", {}), self.stake(w) ** 2
        if not most > 0:
            return torch.zeros(apart.shape[:-1], dtype=apart.dtype)
        share = np.broadcast_to(own["share"], apart.shape[-1]).astype(float)
        begins = own["horizon"] * (apart.square() @ torch.from_numpy(share))
        return -most * torch.expm1(-begins)

    def stake(self, w: np.ndarray) -> float:
        """What one decision accounts for under the weights `w` [M]: a standard deviation, its part of what is unexplained of a sum over `horizon` decisions.

        The scale on which it matters how well a difference between two actions is known. NaN for models of which it was not asked: `paper`, older bundles.
        """
        own = self.details.get("own_response", {})
        return math.sqrt(max(float(w @ np.array(own["covariance"]) @ w), 0.0) / own["horizon"]) if "covariance" in own else math.nan

    def score(self, enc: Encoded | Situation, actions: np.ndarray, weights: Mapping[str, float] | None = None) -> dict[str, np.ndarray]:
        """What ranks actions [B, C, D]: `value`, `caution`, `guardrail` and `total` = value - caution - guardrail, each [B, C]."""
        at, w = self.situations(enc), self._weights(weights)
        scores = self._scores(at, action_features(self._units(actions), self.polynomial), w, self.shape_of_doubt(at, w))
        return {name: score.numpy() for name, score in scores.items()}

    def expert_actions(self, enc: Encoded | Situation) -> np.ndarray:
        """[B, K, D] what each behaviour policy would do here on average, in raw units inside the bounds (the nearest item's embedding for a catalogue)."""
        expected = self.situations(enc).expected
        if self.catalogue is not None:
            distance = torch.cdist(expected, torch.from_numpy(self.catalogue.embedding).double())
            return self.catalogue.embedding[distance.argmin(-1).numpy()].astype(float)
        return np.clip(self.units.raw(expected[..., : len(self.platform.bounds)].numpy()), *self.platform.bounds.T)

    def policy_probability(self, enc: Encoded | Situation) -> np.ndarray:
        """[B, K] how often each behaviour policy acts in such a state."""
        return self.situations(enc).assignment.numpy()

    def disagreement(self, enc: Encoded | Situation) -> np.ndarray:
        """[B] weighted disagreement of the twin critics about the level."""
        return (self.situations(enc).disagreement @ torch.from_numpy(np.abs(self.platform.weights))).numpy()

    def embedding(self, enc: Encoded | Situation) -> np.ndarray:
        """[B, Z] float32 balanced states, in which nearness is measured."""
        return self.situations(enc).b.numpy()

    def best(self, enc: Encoded | Situation, weights: Mapping[str, float] | None = None, limits: Mapping[str, Mapping[str, float]] | None = None) -> np.ndarray:
        """[B, D] the noise-free best action under other objective weights and limits."""
        at, w = self.situations(enc), self._weights(weights)
        if self.catalogue is not None:
            scores, items = self.item_scores(at, w, None)
            return self.catalogue.embedding[items[np.arange(len(at)), scores.numpy().argmax(1)]].astype(float)
        low, high = self.edges(limits)
        found = self._search(at, low, high) if w is self.platform.weights else self.best_units(at, w, low, high).numpy()
        return self.on_grid(self.units.raw(found), low, high)

    def check(
        self, limits: Mapping[str, Mapping[str, float]] | None = None, eligible: Sequence[str] | None = None, top_k: int = 1, exploration: float | None = None
    ) -> None:
        """Raises the `RequestError` that `recommend` would for what a request narrows."""
        self._exploration(exploration)
        if self.catalogue is None:
            if eligible is not None or top_k != 1:
                raise RequestError("eligible, top_k: expected only where actions are items of a catalogue")
            if limits:
                self.edges(limits)
            return
        if limits:
            raise RequestError("limits: expected none, since actions are items of a catalogue; use eligible")
        most = min(len(self._allowed(eligible)), NEAREST_ITEMS)
        if not 1 <= top_k <= most:
            raise RequestError(f"top_k: expected 1 to {most}, the items there are, got {top_k}")

    # ---- recommending ---------------------------------------------------------------------------------------------------
    def edges(self, limits: Mapping[str, Mapping[str, float]] | None) -> tuple[np.ndarray, np.ndarray]:
        """[D] low and [D] high in raw units after a request's limits; raises `RequestError` for limits that leave no action."""
        low, high = self.platform.bounds.T.copy()
        names = self.platform.dimension_names
        for name, edges in (limits or {}).items():
            if name not in names:
                raise RequestError(f"limits: {name!r} is no action dimension; expected {', '.join(names) or 'none, since actions are items'}")
            if unknown := set(edges) - {"low", "high"}:
                raise RequestError(f"limits.{name}: expected low and high, got {', '.join(sorted(unknown))}")
            i = names.index(name)
            low[i], high[i] = max(low[i], edges.get("low", low[i])), min(high[i], edges.get("high", high[i]))
            if step := self.platform.steps[i]:
                origin = self.platform.bounds[i, 0]
                low[i], high[i] = origin + np.ceil((low[i] - origin) / step - 1e-9) * step, origin + np.floor((high[i] - origin) / step + 1e-9) * step
            if not low[i] <= high[i]:
                raise RequestError(
                    f"limits.{name}: nothing is left between {low[i]:g} and {high[i]:g}; "
                    f"the platform allows {self.platform.bounds[i, 0]:g} to {self.platform.bounds[i, 1]:g}"
                )
        return low, high

    def on_grid(self, action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Actions moved to the nearest allowed value of each dimension that has a step."""
        step, origin = self.platform.steps, self.platform.bounds[:, 0]
        if not step.any():
            return np.clip(action, low, high)
        snapped = np.where(step > 0, origin + np.round((action - origin) / np.where(step > 0, step, 1)) * step, action)
        return np.clip(snapped, low, high)

    def law(self, low: np.ndarray, high: np.ndarray, exploration: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """sd, left and right edges [D] of the served law: per dimension a normal around the mean, truncated and renormalised, never clipped.

        A dimension with a step lives on its grid: the law of a cell is the mass between its edges.
        """
        half = self.platform.steps / 2
        return exploration * (self.platform.bounds[:, 1] - self.platform.bounds[:, 0]), low - half, high + half

    def density(
        self, action: np.ndarray, mean: np.ndarray, limits: Mapping[str, Mapping[str, float]] | None = None, exploration: float | None = None
    ) -> np.ndarray:
        """[B] density, per raw units, with which the law around `mean` [B, D] draws `action` [B, D]; 0 outside, NaN where there is no density."""
        low, high = self.edges(limits)
        sd, left, right = self.law(low, high, self._exploration(exploration))
        if (sd == 0).any() or self._is_one_value(low, high):
            return np.full(len(action), np.nan)
        inside = ((action >= low - 1e-9) & (action <= high + 1e-9)).all(1)
        return np.where(inside, self._density(action, mean, sd, ndtr((right - mean) / sd) - ndtr((left - mean) / sd)), 0.0)

    def _density(self, action: np.ndarray, mean: np.ndarray, sd: np.ndarray, mass: np.ndarray) -> np.ndarray:
        """[B] density of actions inside the edges, of a law whose dimensions have `mass` [B, D] between theirs."""
        step = self.platform.steps
        gridded = step > 0
        density: np.ndarray = np.exp(-0.5 * ((action - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))
        if gridded.any():
            cell = ndtr((action + step / 2 - mean) / sd) - ndtr((action - step / 2 - mean) / sd)
            density = np.where(gridded, cell / np.where(gridded, step, 1), density)
        product: np.ndarray = np.multiply.reduce(density / mass, 1)
        return product

    def _is_one_value(self, low: np.ndarray, high: np.ndarray) -> bool:
        """Whether limits leave one value of some dimension, as far as floats can tell: of that alone there is no density."""
        return bool((high - low <= LEAST * (self.platform.bounds[:, 1] - self.platform.bounds[:, 0])).any())

    def _exploration(self, cap: float | None) -> float:
        """The share of each dimension's range over which noise is spread, under a request's `cap`; 0 where it would be less than `LEAST`."""
        if cap is not None and not 0 <= cap <= 1:
            raise RequestError(f"exploration: expected a share of each dimension's range between 0 and 1, got {cap:g}")
        share = min(self.platform.serving.exploration, cap if cap is not None else 1.0)
        return share if share >= LEAST else 0.0

    def recommend(
        self,
        states: PlayerStates,
        explore: bool = True,
        *,
        seeds: np.ndarray | None = None,
        limits: Mapping[str, Mapping[str, float]] | None = None,
        exploration: float | None = None,
        eligible: Sequence[str] | None = None,
        top_k: int = 1,
    ) -> Recommendation:
        """The best action for every state under the platform's weights, drawn from its law if `explore`.

        `seeds` [B] uint64 make the draw repeatable; `limits` narrow dimensions, `eligible` narrows a catalogue, `exploration` caps the noise.
        Raises `RequestError` for a wrong shape and for limits that leave no action.
        """
        enc = self.encode(states)
        seeds = np.random.default_rng().integers(0, 2**63, len(enc), dtype=np.uint64) if seeds is None else np.asarray(seeds, np.uint64)
        return self.draw(enc, explore, seeds, limits=limits, exploration=exploration, eligible=eligible, top_k=top_k)

    def draw(
        self,
        enc: Encoded,
        explore: bool,
        seeds: np.ndarray,
        *,
        limits: Mapping[str, Mapping[str, float]] | None = None,
        exploration: float | None = None,
        eligible: Sequence[str] | None = None,
        top_k: int = 1,
    ) -> Recommendation:
        """`recommend` for states that are encoded already, all of it in padded batches of fixed sizes."""
        if len(enc) == 0:
            raise RequestError("expected at least one state")
        self.check(limits, eligible, top_k, exploration)
        share = self._exploration(exploration)
        parts = []
        with torch.inference_mode():
            for start, n, size in pieces(len(enc)):
                at = self.look(enc[start : start + n].padded(size))
                own = np.resize(seeds[start : start + n], size)
                whole = (
                    self._draw_actions(at, explore, own, limits, share)
                    if self.catalogue is None
                    else self._draw_items(at, explore, own, eligible, top_k, share)
                )
                parts.append(whole[:n])
        if len(parts) == 1:
            return parts[0]
        ranking = None if parts[0].ranking is None else [ranked for part in parts for ranked in part.ranking or []]
        return Recommendation(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in _DRAWN}, ranking=ranking)

    def draw_again(self, enc: Encoded, seed: int, slot: tuple[int, int], explore: bool, **narrowed: Any) -> Recommendation:
        """What `draw` gave for one state at a place in a batch, bit for bit on the same machine: that batch, filled with this state alone."""
        size, place = slot
        if size not in CHUNKS:
            raise RequestError(f"slot: expected a batch of {', '.join(map(str, CHUNKS))} states, got one of {size}")
        return self.draw(enc.padded(size), explore, np.full(size, seed, np.uint64), **narrowed)[place : place + 1]

    def _draw_actions(self, at: Situation, explore: bool, seeds: np.ndarray, limits: Mapping[str, Mapping[str, float]] | None, share: float) -> Recommendation:
        low, high = self.edges(limits)
        mean = self.on_grid(self.units.raw(self._search(at, low, high)), low, high)
        action, propensity = mean, np.full(len(at), np.nan)
        if explore and share > 0:
            sd, left, right = self.law(low, high, share)
            below, above = ndtr((left - mean) / sd), ndtr((right - mean) / sd)
            drawn = mean + sd * ndtri(below + uniforms(seeds, mean.shape[1]) * (above - below))
            action = self.on_grid(np.clip(drawn, low, high), low, high)
            if not self._is_one_value(low, high):
                propensity = self._density(action, mean, sd, above - below)
        by_objective = self._values(at, action)
        return Recommendation(action, by_objective @ self.platform.weights, by_objective, propensity, mean, seeds, _slots(len(at)))

    def _values(self, at: Situation, action: np.ndarray) -> np.ndarray:
        """[B, M] the value of actions [B, D] in raw units, for answers."""
        return forward.values_of(at, self.units.standard(action))

    def _allowed(self, eligible: Sequence[str] | None) -> np.ndarray:
        """Positions of the items that may be recommended."""
        assert self.catalogue is not None
        allowed = np.arange(len(self.catalogue.ids)) if eligible is None else np.unique(self.catalogue.positions(eligible))
        if len(allowed) == 0:
            raise RequestError("eligible: expected at least one item, each of the catalogue")
        if allowed[0] < 0:
            raise RequestError("eligible: names an item that is not in the catalogue")
        return allowed

    def item_scores(self, at: Situation, w: np.ndarray, eligible: Sequence[str] | None) -> tuple[Tensor, np.ndarray]:
        """Totals [B, C] and positions [B, C] of the items that are re-ranked: all eligible ones, or the nearest to what is proposed."""
        assert self.catalogue is not None
        allowed = self._allowed(eligible)
        vectors = torch.from_numpy(self.catalogue.embedding[allowed]).double()
        items = np.broadcast_to(allowed, (len(at), len(allowed)))
        if len(allowed) > NEAREST_ITEMS:  # the actor proposes, the critic re-ranks (arXiv 1512.07679)
            centres = torch.cat([at.proposal[:, None], at.expected], 1)
            nearest = torch.cdist(centres, vectors).amin(1).topk(NEAREST_ITEMS, largest=False).indices
            items, vectors = allowed[nearest.numpy()], vectors[nearest]
        else:
            vectors = vectors.expand(len(at), -1, -1)
        return self._scores(at, vectors, w, self.shape_of_doubt(at, w))["total"], items

    def item_law(self, total: Tensor, at: Situation, share: float) -> Tensor:
        """[B, C] probability of each re-ranked item: a softmax whose temperature is the doubt itself, above a uniform floor.

        Items whose totals differ by less than what is not known keep similar chances; clear evidence concentrates the law.
        """
        w = self.platform.weights
        assert self.catalogue is not None
        spread = torch.from_numpy(self.catalogue.embedding.std(0)).double()
        temperature = torch.einsum("p,bpq,q->b", spread, self.shape_of_doubt(at, w), spread).clamp(min=1e-12).sqrt()
        return self.softened(total / temperature[:, None], share)

    def softened(self, logits: Tensor, share: float) -> Tensor:
        """[B, C] a softmax above the uniform floor; without exploration there is none."""
        floor = UNIFORM_SHARE if share > 0 else 0.0
        return (1 - floor) * torch.softmax(logits, 1) + floor / logits.shape[1]

    def _draw_items(self, at: Situation, explore: bool, seeds: np.ndarray, eligible: Sequence[str] | None, top_k: int, share: float) -> Recommendation:
        assert self.catalogue is not None
        total, items = self.item_scores(at, self.platform.weights, eligible)
        law = self.item_law(total, at, share)
        best = total.argmax(1).numpy()
        noise = -np.log(-np.log(uniforms(seeds, items.shape[1])))
        order = np.argsort(-(law.log().numpy() + noise if explore and share > 0 else total.numpy()), 1, kind="stable")[:, :top_k]  # Gumbel top-k: no repeats
        rows, first = np.arange(len(at)), order[:, 0]
        ids = np.array(self.catalogue.ids, object)
        propensity = law.numpy()[rows, first] if explore and share > 0 else np.full(len(at), np.nan)
        vectors = torch.from_numpy(self.catalogue.embedding[items[rows, first]]).double()
        by_objective = self.totals(at, vectors[:, None])[:, 0, :, 0].numpy()
        ranking = [list(ids[items[row, order[row]]]) for row in rows]
        best_items, weighted = ids[items[rows, best]], by_objective @ self.platform.weights
        return Recommendation(ids[items[rows, first]], weighted, by_objective, propensity, best_items, seeds, _slots(len(at)), ranking)

    def explain(
        self, states: PlayerStates, actions: Any = None, against: Any = None, weights: Mapping[str, float] | None = None, *, attributions: bool = True
    ) -> Explanation:
        """Why these actions (default: the noise-free best ones): see `fastq.explanation.explain`."""
        from fastq.explanation import explain  # explanations are made above policies; only this shortcut looks up

        return explain(self, states, actions=actions, against=against, weights=weights, attributions=attributions)

    # ---- the bundle -----------------------------------------------------------------------------------------------------
    def save(self, directory: Path) -> None:
        """Write the bundle: `weights.safetensors` and `bundle.json` with the sha256 of every file. The directory must not exist yet."""
        directory.mkdir(parents=True)
        tensors = {
            f"{name}.{key}": value.detach().cpu().contiguous().numpy()
            for name in ("network", "values", "actor")
            for key, value in getattr(self, name).state_dict().items()
        }
        tensors |= {name: np.ascontiguousarray(getattr(self, name)) for name in ("effects", "covariance", "spread", "multipliers", "scale")}
        tensors |= {
            "encoding.mean": self.encoding.mean,
            "encoding.scale": self.encoding.scale,
            "units.centre": self.units.centre,
            "units.width": self.units.width,
            "reference.embedding": self.reference.embedding,
            "reference.action": self.reference.action,
        }
        if self.catalogue is not None:
            tensors["catalogue.embedding"] = self.catalogue.embedding
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, directory / "weights.safetensors")
        tree = {
            "format": 1,
            "platform": self.platform.model_dump(mode="json"),
            "fingerprint": self.platform.fingerprint(),
            "features": self.fingerprint,
            "policies": self.policies,
            "sizes": self.network.sizes.__dict__,
            "numeric": self.encoding.numeric,
            "vocabularies": self.encoding.vocabularies,
            "catalogue": self.catalogue.ids if self.catalogue else None,
            "reference": {"decision_id": self.reference.decision_id, "policy": self.reference.policy},
            "details": self.details,
            "files": {"weights.safetensors": hashlib.sha256((directory / "weights.safetensors").read_bytes()).hexdigest()},
        }
        (directory / "bundle.json").write_text(json.dumps(tree, indent=1, allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, version: str | None = None) -> Policy:
        """Read a bundle; raises `BundleError` if a file is missing or its checksum differs."""
        directory = Path(directory)
        try:
            tree = json.loads((directory / "bundle.json").read_text(encoding="utf-8"))
            found = hashlib.sha256((directory / "weights.safetensors").read_bytes()).hexdigest()
        except (OSError, ValueError) as error:
            raise BundleError(f"{directory}: not a readable bundle ({error})") from None
        if tree.get("format") != 1 or tree["files"]["weights.safetensors"] != found:
            raise BundleError(f"{directory}: weights.safetensors is not the file this bundle was written with; fetch the model again")
        arrays = load_file(directory / "weights.safetensors")
        sizes = Sizes(**tree["sizes"])
        form: type[Policy] = cls
        if tree["platform"]["training"].get("preset") == "paper":
            from fastq.paper import PaperPolicy  # the published form stands above; only a bundle of it looks up

            form = PaperPolicy
        network, values, actor = form.networks(sizes)
        modules: dict[str, torch.nn.Module] = {"network": network, "values": values, "actor": actor}
        for name, module in modules.items():
            module.load_state_dict({key.removeprefix(f"{name}."): torch.from_numpy(value) for key, value in arrays.items() if key.startswith(f"{name}.")})
            module.eval().requires_grad_(False)
        encoding = Encoding(arrays["encoding.mean"], arrays["encoding.scale"], {k: (v[0], v[1]) for k, v in tree["numeric"].items()}, tree["vocabularies"])
        return form(
            platform=platform_from_tree(tree["platform"], Path(), str(directory / "bundle.json")),
            encoding=encoding,
            catalogue=Catalogue(tree["catalogue"], arrays["catalogue.embedding"]) if tree["catalogue"] else None,
            policies=tree["policies"],
            units=Units(arrays["units.centre"], arrays["units.width"]),
            network=network,
            values=values,
            actor=actor,
            effects=arrays["effects"],
            covariance=arrays["covariance"],
            spread=arrays["spread"],
            multipliers=arrays["multipliers"],
            scale=arrays["scale"],
            reference=Reference(arrays["reference.embedding"], tree["reference"]["decision_id"], tree["reference"]["policy"], arrays["reference.action"]),
            details=tree["details"],
            version=version,
        )

    def with_version(self, version: str) -> Policy:
        return replace(self, version=version)


def pieces(n: int) -> list[tuple[int, int, int]]:
    """How n states are cut into batches: the first row of each, its rows, and its size with padding; at most three quarters of a batch are padding."""
    found, start = [], 0
    while start < n:
        left = n - start
        fits = next((size for size in CHUNKS if size >= left), CHUNKS[-1])
        size = fits if fits <= max(4 * left, CHUNKS[0]) else max(size for size in CHUNKS if size <= left)
        found.append((start, min(left, size), size))
        start += size
    return found


def _slots(size: int) -> np.ndarray:
    """[size, 2] the size of a batch and each row's place in it."""
    return np.stack([np.full(size, size), np.arange(size)], 1)


def acting(assignment: Tensor) -> Tensor:
    """[B, K] which policies act in such states often enough to be evidence there; the likeliest always does."""
    return assignment >= assignment.amax(-1, keepdim=True).clamp(max=RARE)


@functools.lru_cache(maxsize=64)
def _directions(d: int, n: int) -> np.ndarray:
    """[n, d] the first points of the Sobol sequence, in [-1, 1]: scipy's to the last bit, without the two seconds that `scipy.stats` takes to import."""
    return torch.quasirandom.SobolEngine(d).draw(n, dtype=torch.float64).numpy() * 2 - 1


@functools.lru_cache(maxsize=64)
def _columns(d: int, n: int) -> np.ndarray:
    """[d, n] the same, candidates last in memory too: whatever is made from them keeps that order, and takes half as long."""
    return np.ascontiguousarray(_directions(d, n).T)


def uniforms(seeds: np.ndarray, n: int) -> np.ndarray:
    """[B, n] numbers in (0, 1), a pure function of each row's seed: splitmix64 (Steele et al., OOPSLA 2014), so a draw can be repeated alone."""
    with np.errstate(over="ignore"):
        z = seeds[:, None] + (np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(float) + 0.5) / 2.0**53


def action_dicts(platform: Platform, action: np.ndarray) -> list[dict[str, Any]]:
    """[B] actions as the mappings that users see: dimension to number, or `item_id`."""
    if names := platform.dimension_names:
        return [dict(zip(names, row, strict=True)) for row in np.asarray(action, float).tolist()]
    return [{"item_id": str(item)} for item in action]


def action_frame(platform: Platform, action: np.ndarray) -> pl.DataFrame:
    """[B] actions as the logs' action columns."""
    if platform.dimension_names:
        return pl.DataFrame({name: action[:, i] for i, name in enumerate(platform.dimension_names)})
    return pl.DataFrame({"item_id": [str(item) for item in action]})
