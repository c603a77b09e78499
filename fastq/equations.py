"""The equations of FAST-Q (arXiv 2504.21383) and of this project's orthogonal critic, in order; pure functions, nothing else.

| here | README | meaning |
| --- | --- | --- |
| `u` | action | an action in standard units: centred and scaled by what was logged; for a catalogue the item's embedding |
| `phi` | action features | what a head is linear in |
| `b`, `psi` | balanced state, effect modifiers | what the state is reduced to |
| `q`, `r` | value, immediate value | per objective; `q - r` is the long term |
| `lam` | reversal strength | of the gradient that balances the representation |

Torch functions work in the dtype they are given; the closed-form ones are float64 NumPy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor

CROSS_UP_TO = 6  # dimensions up to which action features hold cross terms


# ---- stage 1: policy experts and the balanced representation ----------------------------------------------------------------
class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lam: float) -> Tensor:
        ctx.lam = lam
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.lam * gradients[0], None


def reverse_gradient(x: Tensor, lam: float) -> Tensor:
    """Eq. 1: the identity forwards, `-lam` times the gradient backwards (Ganin & Lempitsky, arXiv 1409.7495)."""
    reversed_: Tensor = _Reversal.apply(x, lam)  # type: ignore[no-untyped-call]
    return reversed_


def reversal_strength(progress: float, final: float) -> float:
    """Eq. 2: `final * (2 / (1 + exp(-10 progress)) - 1)`, from 0 to `final` as training goes from 0 to 1 (arXiv 1409.7495, section 5)."""
    return final * (2.0 / (1.0 + math.exp(-10.0 * progress)) - 1.0)


def masked_squared_error(predicted: Tensor, observed: Tensor) -> Tensor:
    """Eq. 3: mean squared error over the entries of `observed` that are known (not NaN); 0 where none is."""
    known = torch.isfinite(observed)
    error = torch.where(known, predicted - torch.nan_to_num(observed), torch.zeros_like(predicted))
    return error.square().sum() / known.sum().clamp(min=1)


def discrepancy(x: Tensor, y: Tensor, width: float) -> Tensor:
    """Eq. 3b: how far two samples of states, [n, Z] and [m, Z], are apart: the maximum mean discrepancy under a Gaussian kernel (JMLR 13:723, 2012, eq. 5).

    `k(a, b) = exp(-|a - b|^2 / width^2)`; the root of `mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`, all pairs, a point with itself included: 0 for
    equal samples, and biased upwards by about `sqrt(1/n + 1/m)` where laws are equal.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / width**2).mean()

    return (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)).clamp(min=0).sqrt()


def action_features(u: Tensor, polynomial: bool) -> Tensor:
    """Eq. 4: `phi(u)`, [..., D] to [..., P]: `u`, its products `u_i u_j` (i <= j) and its cubes; `u` alone if not polynomial.

    The cubes let an effect bend where policies overlap, as a player's reaction to a target does; for many dimensions cross terms would
    outnumber what logs can teach, and only squares and cubes are kept.
    """
    if not polynomial:
        return u
    d = u.shape[-1]
    if d > CROSS_UP_TO:
        return torch.cat([u, u.square(), u**3], -1)
    i, j = torch.triu_indices(d, d, device=u.device)
    return torch.cat([u, u.index_select(-1, i) * u.index_select(-1, j), u**3], -1)


def feature_count(d: int, polynomial: bool) -> int:
    """P of Eq. 4."""
    return d if not polynomial else 3 * d if d > CROSS_UP_TO else 2 * d + d * (d + 1) // 2


def expected_features(mean: Tensor, sd: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Eq. 4 in expectation, [B, D] to [B, P], under independent normals around `mean` truncated to `low`..`high`; exact.

    Raw moments by their recursion, `m_k = (k-1) s^2 m_{k-2} + mu m_{k-1} - s^2 [x^{k-1} p(x)]` between the edges.
    """
    alpha, beta = (low - mean) / sd, (high - mean) / sd
    density = [torch.exp(-0.5 * edge.square()) / math.sqrt(2 * math.pi) for edge in (alpha, beta)]
    mass = torch.special.ndtr(beta) - torch.special.ndtr(alpha)
    moments = [torch.ones_like(mean)]
    for k in (1, 2, 3):
        edges = (high ** (k - 1) * density[1] - low ** (k - 1) * density[0]) * sd / mass
        moments.append(((k - 1) * sd.square() * moments[k - 2] if k > 1 else 0.0) + mean * moments[k - 1] - edges)
    d = mean.shape[-1]
    if d > CROSS_UP_TO:
        return torch.cat(moments[1:], -1)
    i, j = torch.triu_indices(d, d, device=mean.device)
    return torch.cat([moments[1], torch.where(i == j, moments[2][..., i], moments[1][..., i] * moments[1][..., j]), moments[3]], -1)


# ---- stage 2: returns, the orthogonal critic, the bound -------------------------------------------------------------------
def horizon_return(r: np.ndarray, discount: np.ndarray, following: np.ndarray, open_ended: np.ndarray, end_value: np.ndarray, steps: int) -> np.ndarray:
    """Eq. 5: `y_i = r_i + d_i r_{i+1} + … ` over `steps` decisions, then `end_value` [N, M] of the state reached, per objective.

    r, discount [N, M]: a discount of 0 ends the sum; following [N] index or -1; open_ended [N, M]: something follows that the log does not
    hold. NaN where a summed reward is unknown or the sum would have to go on past the log's end.
    """
    y, factor, at = np.zeros_like(r), np.ones_like(r), np.arange(len(r))
    for _ in range(steps):
        alive = factor > 0
        y += np.where(alive, factor * r[at], 0.0)
        y[alive & open_ended[at]] = np.nan
        factor = factor * discount[at]
        at = np.where(following[at] >= 0, following[at], at)
    return y + np.where(factor > 0, factor * end_value[at], 0.0)


def ridge(x: np.ndarray, y: np.ndarray, strength: np.ndarray | float) -> np.ndarray:
    """Eq. 6: `(x'x + strength I)^-1 x'y` with x [N, d], y [N, T]; one strength for all targets."""
    return ridge_from(x.T @ x, x.T @ y, strength)


def ridge_from(gram: np.ndarray, moment: np.ndarray, strength: np.ndarray | float) -> np.ndarray:
    """Eq. 6 from `x'x` [d, d] and `x'y` [d, T], where parts of them are shared."""
    strengthened = gram.copy()
    strengthened[np.diag_indices_from(gram)] += strength
    solution: np.ndarray = cho_solve(cho_factor(strengthened), moment)
    return solution


def orthogonal_design(psi: np.ndarray, centred: np.ndarray) -> np.ndarray:
    """Eq. 7: `psi (x) (phi(a) - E[phi | s, p])`, [N, S] and [N, P] to [N, S * P], what the residual outcome is regressed on.

    The action centred by what the acting policy does there on average leaves that policy's own noise, a natural experiment
    (double machine learning, arXiv 1608.00060; the R-learner, arXiv 1712.04912).
    """
    return (psi[:, :, None] * centred[:, None, :]).reshape(len(psi), -1)


def clustered_covariance(x: np.ndarray, residual: np.ndarray, cluster: np.ndarray, strength: float) -> np.ndarray:
    """Eq. 8: the sandwich `A^-1 (sum_c g_c g_c') A^-1` of all objectives jointly, `g_c` the score of cluster `c` (one player).

    x [N, d], residual [N, M], cluster [N] int; returns [M, M, d, d]. `A = x'x + strength I` with a weak strength of its own, so that
    a head that was shrunk to nothing still carries its doubt (Liang & Zeger, Biometrika 1986).
    """
    n, d = x.shape
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += strength
    order = np.argsort(cluster, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(cluster[order]) != 0])
    scores = np.stack([np.add.reduceat(x[order] * residual[order, j, None], starts, axis=0) for j in range(residual.shape[1])])
    whitened = cho_solve(cho_factor(gram), scores.reshape(-1, d).T).T.reshape(scores.shape)
    freedom = len(starts) / max(len(starts) - 1, 1) * n / max(n - d, 1)
    # what the data say nothing about keeps the prior's variance: residual variance over the prior's strength, the ridge's own posterior
    prior = cho_solve(cho_factor(gram), np.eye(d)) @ cho_solve(cho_factor(gram), strength * np.eye(d))
    return freedom * np.einsum("jcd,kce->jkde", whitened, whitened, optimize=True) + np.cov(residual.T).reshape(residual.shape[1], -1)[:, :, None, None] * prior


def lower_bound(advantage: Tensor, variance: Tensor, k: float) -> Tensor:
    """Eq. 9: `A - k sd`, the bound on the difference to the reference that candidates are ranked by."""
    return advantage - k * (variance.clamp(min=0) + 1e-12).sqrt()


def td_target(r: Tensor, discount: Tensor, q_next: Tensor, w: Tensor) -> Tensor:
    """Eq. 10: `r + discount * q_next[twin]`, per objective; the twin is the one whose *weighted total* is smaller.

    r, discount [B, M]; q_next [2, B, M] of the policy's one next action; w [M]. A minimum per head would be optimistic for a negative weight.
    """
    total = (q_next * w).sum(-1)
    chosen = torch.where((total[0] <= total[1])[:, None], q_next[0], q_next[1])
    return r + discount * chosen


def behaviour_weight(q: Tensor, alpha: float) -> Tensor:
    """Eq. 11: `alpha / mean|Q|`, the scale of the value term beside the cloning term of TD3+BC (arXiv 2106.06860), never a division by 0."""
    return alpha / q.detach().abs().mean().clamp(min=1e-6)


def exploration_share(progress: float, final: float = 0.6) -> float:
    """Eq. 12: the share of samples whose actor step is counterfactual, growing linearly over training up to `final` (paper: 0.6)."""
    return final * min(max(progress, 0.0), 1.0)


@torch.no_grad()
def soft_update(targets: list[Tensor], sources: list[Tensor], tau: float) -> None:
    """Eq. 13: `target <- (1 - tau) target + tau source`, in place."""
    torch._foreach_lerp_(targets, sources, tau)


# ---- the published form: what the preset `paper` has of its own -----------------------------------------------------------------
def difficulty_weights(named: Tensor) -> Tensor:
    """Eq. 14: [K] how often rows of each policy are drawn next, from how often the adversary named each branch, [K] counts: `1 + n_k` over their sum.

    The published form has `n_k` alone, with which a policy that was never named would never be drawn again, and an adversary that names none of
    a batch's could not be trained at all; the 1 is the repair (departure 9).
    """
    share: Tensor = (1.0 + named) / (1.0 + named).sum()
    return share


def share_values(q: Tensor, logits: Tensor, shared: Tensor) -> Tensor:
    """Eq. 15: `q softmax(logits)`, [...] and [..., M + 1] to [..., M + 1]: shares of the value that are positive and sum to it, the last for the long term.

    shared [M + 1] bool: an objective that lowers the value cannot have a share of it, and gets none (the paper leaves its cost out too).
    """
    return q[..., None] * torch.softmax(logits.masked_fill(~shared, -torch.inf), -1)


def published_critic_loss(q: Tensor, target: Tensor, shares: Tensor, immediate: Tensor) -> Tensor:
    """Eq. 16: `0.75 (q - target)^2 + 0.25 (share_m q - w_m r_m)^2`, means over rows that are known; q, target [B], shares, immediate [B, M]."""
    return 0.75 * masked_squared_error(q, target) + 0.25 * masked_squared_error(shares, immediate)


def smoothed_action(u: Tensor, noise: Tensor, sd: float = 0.2, most: float = 0.5) -> Tensor:
    """Eq. 17: the target policy's action with standard normal `noise` times `sd`, clipped at `most` (TD3, arXiv 1802.09477)."""
    return u + (sd * noise).clamp(-most, most)


def cloning_actor_loss(q: Tensor, u: Tensor, cloned: Tensor, alpha: float) -> Tensor:
    """Eq. 18: `-(alpha / mean|q|) mean q + |u - cloned|^2`, q [B] the value of the actor's own action u [B, D] (TD3+BC, arXiv 2106.06860)."""
    return -behaviour_weight(q, alpha) * q.mean() + masked_squared_error(u, cloned)
