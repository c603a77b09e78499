"""From a state to the best action in NumPy: `Policy.situation` and `Policy.best_units` once more, for answers and not for gradients or graphs.

A draw for a few states is some hundred small operations, and torch needs several times as long as NumPy to begin one. Layers that read the same input are
one product here, candidates lie last in memory. `tests/test_forward.py` holds both ways to each other.

Shapes: B states, W periods, F numbers in a row, G attribute numbers, K policies, P action features, M objectives, Z balanced state, S modifiers, C candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from fastq.equations import CROSS_UP_TO
from fastq.networks import Actor, Representation, Values

TINY = 1e-5  # what torch's LayerNorm adds to a variance


@dataclass(frozen=True)
class Weights:
    """A policy as arrays. Of the networks, float32, matrices are [inputs, outputs] and layers that read the same input lie side by side."""

    rows: int  # F
    experts: tuple[int, int]  # K, and how wide the hidden layer of each is
    modifiers: int
    objectives: int
    decay: np.ndarray  # [scales, W]
    mass: np.ndarray  # [scales, 1]
    dense: tuple[np.ndarray, np.ndarray]
    attributes: tuple[np.ndarray, np.ndarray]
    encoded: tuple[np.ndarray, np.ndarray]  # gain and bias of the norm
    of_encoded: tuple[np.ndarray, np.ndarray]  # the experts' hidden layers, then the assignment
    phi: tuple[np.ndarray, np.ndarray]  # [K, hidden, P] and [K, 1, P], in the units of action features
    balance: tuple[np.ndarray, np.ndarray]
    balanced: tuple[np.ndarray, np.ndarray]  # gain and bias of the norm
    of_balanced: tuple[np.ndarray, np.ndarray]  # modifiers, linear level, both twins' hidden layers, the actor's first
    twins: tuple[np.ndarray, np.ndarray]  # [2, hidden, 2M] and [2, 1, 2M]
    actor: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # its second layer and its last
    # of the critic, float64
    scale: np.ndarray  # [M, 1]
    slopes: np.ndarray  # [S, M * 2 * P] the effects, so that one product gives the slopes of a batch
    doubt: np.ndarray  # [S * S, P * P] covariance of the weighted value's effects: a row per pair of modifiers, a column per pair of action features
    features: int  # P
    # of the evidence, float64
    spread: np.ndarray  # [K, D]
    margin: float  # how many of them the evidence reaches
    rare: float  # share below which a policy is no evidence
    bounds: np.ndarray  # [2, D] standard units; empty for a catalogue


def weights_of(
    network: Representation,
    values: Values,
    actor: Actor,
    *,
    effects: np.ndarray,
    joint: np.ndarray,
    scale: np.ndarray,
    spread: np.ndarray,
    reach: float,
    rare: float,
    bounds: np.ndarray,
) -> Weights:
    """The weights as they are now; the modules may be trained on without changing them. `joint` [S * P, S * P]: of the platform's own weights."""

    def array(parameter: Tensor) -> np.ndarray:
        return np.array(parameter.detach().cpu().numpy())

    def layer(linear: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        return np.ascontiguousarray(array(linear.get_parameter("weight")).T), array(linear.get_parameter("bias"))

    def norm(module: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        return array(module.get_parameter("weight")), array(module.get_parameter("bias"))

    def beside(*layers: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([matrix for matrix, _ in layers], 1), np.concatenate([bias for _, bias in layers])

    encoder, experts = network.encoder, network.experts
    beta, unit = array(experts.beta), array(experts.scale)  # [K, inputs, hidden] and [P]
    hidden = (np.concatenate(list(beta), 1), array(experts.beta_bias).reshape(-1))
    decay = array((-encoder.log_rate.detach().exp()[:, None] * encoder.age).exp())
    twins = [layer(twin.get_submodule("2")) for twin in values.twins]
    of_balanced = [network.modifiers, values.linear, *(twin.get_submodule("0") for twin in values.twins), actor.layers[0]]
    s, p = effects.shape[2:]
    return Weights(
        rows=encoder.row,
        experts=(beta.shape[0], beta.shape[2]),
        modifiers=network.modifiers.out_features,
        objectives=values.m,
        decay=decay,
        mass=decay.sum(1, keepdims=True),
        dense=layer(encoder.dense),
        attributes=layer(encoder.attributes),
        encoded=norm(encoder.norm),
        of_encoded=beside(hidden, layer(network.assignment)),
        phi=(array(experts.phi) * unit, (array(experts.mean) + unit * array(experts.phi_bias))[:, None]),
        balance=layer(network.balance[0]),
        balanced=norm(network.balance[2]),
        of_balanced=beside(*map(layer, of_balanced)),
        twins=(np.stack([matrix for matrix, _ in twins]), np.stack([bias for _, bias in twins])[:, None]),
        actor=(layer(actor.layers[2]), layer(actor.layers[4])),
        scale=scale[:, None],
        slopes=np.ascontiguousarray(effects.transpose(2, 0, 1, 3)).reshape(s, -1),
        doubt=np.ascontiguousarray(joint.reshape(s, p, s, p).transpose(0, 2, 1, 3)).reshape(s * s, p * p),
        features=p,
        spread=spread,
        margin=reach,
        rare=rare,
        bounds=bounds,
    )


def look(w: Weights, x: np.ndarray, v: np.ndarray, branch: np.ndarray) -> tuple[np.ndarray, ...]:
    """The parts of a `fastq.policy.Situation`, in its order; x [B, W, 2F], v [B, G], branch [B, K] as `Representation.forward` takes them."""
    n, (k, hidden), s = len(x), w.experts, w.modifiers
    with np.errstate(over="ignore"):  # exp of a large number is infinite, and what is divided by it nothing: as it should be
        pooled = w.decay @ x  # [B, scales, 2F]
        total, mass = pooled[..., : w.rows], pooled[..., w.rows :]
        history = np.concatenate([total / np.maximum(mass, 1e-3), mass / w.mass], -1).reshape(n, -1)
        about = v if v.shape[1] else np.zeros((n, 1), np.float32)
        e = _normal(np.concatenate([_silu(_linear(history, w.dense)), _silu(_linear(about, w.attributes))], 1), w.encoded)

        both = _linear(e, w.of_encoded)
        h = _silu(both[:, : k * hidden]).reshape(n, k, hidden)
        expected = (h.transpose(1, 0, 2) @ w.phi[0] + w.phi[1]).transpose(1, 0, 2)
        mixed = _linear((branch[:, None] @ h)[:, 0], w.balance)
        b = _normal(np.where(mixed > 0, mixed, np.exp(np.minimum(mixed, 0)) - 1), w.balanced)  # ELU

        out = _linear(b, w.of_balanced)
        psi = np.concatenate([np.ones((n, 1), np.float32), np.tanh(out[:, :s])], 1)
        linear, deep = out[:, s : s + 2 * w.objectives], _silu(out[:, s + 2 * w.objectives :])
        width = w.twins[0].shape[1]
        heads = deep[:, : 2 * width].reshape(n, 2, width).transpose(1, 0, 2) @ w.twins[0] + w.twins[1] + linear
        share = 1 / (1 + np.exp(-_linear(_silu(_linear(deep[:, 2 * width :], w.actor[0])), w.actor[1])))
    twins = heads.reshape(2, n, w.objectives, 2) * w.scale  # from here on float64
    psi, expected, logits = psi.astype(float), expected.astype(float), both[:, k * hidden :].astype(float)
    assignment = np.exp(logits - np.maximum.reduce(logits, 1, keepdims=True))
    assignment /= np.add.reduce(assignment, 1, keepdims=True)
    reach = _reach(w, expected, assignment)
    return (
        b,
        (twins[0] + twins[1]) / 2,
        np.abs((twins[0] - twins[1])[..., 0]),
        (psi @ w.slopes).reshape(n, w.objectives, 2, w.features),
        psi,
        (assignment[:, None] @ expected)[:, 0],
        expected,
        assignment,
        reach[:, 0] + (reach[:, 1] - reach[:, 0]) * share,
        reach,
    )


def _reach(w: Weights, expected: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """As `Policy.reach`."""
    acts, there, margin = _acting(w, assignment)[..., None], expected[..., : w.spread.shape[1]], w.margin * w.spread
    low = np.minimum.reduce(np.where(acts, there - margin, np.inf), 1)
    high = np.maximum.reduce(np.where(acts, there + margin, -np.inf), 1)
    edges = np.stack([low, high], 1)
    return np.minimum(np.maximum(edges, w.bounds[0]), w.bounds[1]) if w.bounds.size else edges


def _acting(w: Weights, assignment: np.ndarray) -> np.ndarray:
    """As `fastq.policy.acting`."""
    return assignment >= np.minimum(np.maximum.reduce(assignment, 1, keepdims=True), w.rare)


def values_of(at: Any, u: np.ndarray) -> np.ndarray:
    """[B, M] what `Policy.totals` says of the values of one continuous action per state [B, D], standard units; `at`: a `fastq.policy.Situation`."""
    level, slope, reference = (getattr(at, name).numpy() for name in ("level", "slope", "reference"))
    apart = candidate_features(u[..., None]) - reference[..., None]
    values: np.ndarray = level[..., 0] + (slope[:, :, 0] @ apart)[..., 0]
    return values


class Ranks(NamedTuple):
    """What ranks candidates in B states: the price of their features [B, 1, P], what differences are taken from [B, P, 1], and the doubt [B, P, P]."""

    slope: np.ndarray
    reference: np.ndarray
    doubt: np.ndarray
    caution: float


def best(
    w: Weights,
    at: Any,
    weights: np.ndarray,
    caution: float,
    limits: tuple[np.ndarray, np.ndarray],
    rounds: Sequence[tuple[np.ndarray, float]],
    outside: float,
) -> np.ndarray:
    """[B, D] what `Policy.best_units` finds, standard units. `at`: a `fastq.policy.Situation`; weights [2, M] of values and, negative, of immediate ones;
    limits [D] and [D]; rounds: directions [D, n] and the share of the reach over which they are spread.
    """
    psi, slope, reference, expected = (getattr(at, name).numpy() for name in ("psi", "slope", "reference", "expected"))
    n, s = psi.shape
    d, p = at.proposal.shape[1], w.features
    doubt = ((psi[:, :, None] * psi[:, None]).reshape(n, s * s) @ w.doubt).reshape(n, p, p)
    ranks = Ranks((weights[0] @ slope[:, :, 0] - weights[1] @ slope[:, :, 1])[:, None], reference[..., None], doubt, caution)
    lowest, highest = np.minimum(np.maximum(at.reach.numpy(), limits[0]), limits[1]).transpose(1, 0, 2)[..., None]
    acts = _acting(w, at.assignment.numpy())
    tried = np.concatenate([at.proposal.numpy()[..., None], ranks.reference[:, :d], expected[..., :d].transpose(0, 2, 1)], 2)
    chosen, span, rows = (lowest + highest) / 2, highest - lowest, np.arange(n)
    for directions, share in rounds:
        tried = np.concatenate([chosen, tried, chosen + directions * (share / 2) * span], 2)
        tried = np.minimum(np.maximum(tried, lowest), highest)
        total = _totals(ranks, candidate_features(tried))
        total -= outside * np.maximum(_distance(w, expected[..., :d], acts, tried) - w.margin, 0)
        chosen = tried[rows, :, total.argmax(1)][..., None]
        tried = tried[..., :0]
    found: np.ndarray = chosen[..., 0]
    return found


def _totals(ranks: Ranks, phi: np.ndarray) -> np.ndarray:
    """[B, C] totals of candidates [B, P, C], less what is the same for all of a state."""
    difference = phi - ranks.reference
    variance = np.add.reduce((ranks.doubt @ difference) * difference, 1)
    total: np.ndarray = (ranks.slope @ difference)[:, 0] - ranks.caution * np.sqrt(np.maximum(variance, 0))
    return total


def _distance(w: Weights, expected: np.ndarray, acts: np.ndarray, u: np.ndarray) -> np.ndarray:
    """[B, C] as `Policy._distance`, of candidates [B, D, C]; expected [B, K, D], acts [B, K]."""
    apart = u[:, None] - expected[..., None]
    apart /= np.maximum(w.spread, 1e-6)[..., None]  # in place: fresh memory costs as much as the arithmetic
    apart *= apart
    squares = np.add.reduce(apart, 2)
    distance: np.ndarray = np.sqrt(np.minimum.reduce(np.where(acts[..., None], squares, np.inf), 1))
    return distance


def candidate_features(u: np.ndarray) -> np.ndarray:
    """`equations.action_features` of continuous actions, [B, D, C] to [B, P, C]."""
    d, squares = u.shape[1], u * u
    if d > CROSS_UP_TO:
        return np.concatenate([u, squares, squares * u], 1)
    i, j = _pairs(d)
    return np.concatenate([u, u[:, i] * u[:, j], squares * u], 1)


@functools.cache
def _pairs(d: int) -> tuple[np.ndarray, np.ndarray]:
    i, j = np.triu_indices(d)
    return i, j


def _linear(x: np.ndarray, layer: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    y: np.ndarray = x @ layer[0]
    y += layer[1]
    return y


def _silu(x: np.ndarray) -> np.ndarray:
    y = np.exp(-x)
    y += 1
    return np.divide(x, y, out=y)


def _normal(x: np.ndarray, gain_and_bias: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """LayerNorm over the last axis."""
    n = x.shape[1]
    centred: np.ndarray = x - np.add.reduce(x, 1, keepdims=True) / n
    centred /= np.sqrt(np.add.reduce(centred * centred, 1, keepdims=True) / n + TINY)
    centred *= gain_and_bias[0]
    centred += gain_and_bias[1]
    return centred
