"""The `nn.Module`s: shapes and forward passes, nothing else. The number of policies, actions and objectives is data.

Shapes: B states, W periods, F numbers in a row, G attribute numbers, K policies, P action features, M objectives, Z balanced state, S modifiers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastq import equations


@dataclass(frozen=True)
class Sizes:
    """What decides the shape of every weight; kept in the bundle."""

    window: int
    row: int  # F
    attributes: int  # G
    policies: int  # K
    action: int  # D, or the item embedding's width
    polynomial: bool  # action features hold products and cubes: True for continuous actions
    objectives: int  # M
    scales: int = 6  # time constants of the encoder
    embedding: int = 96
    expert: int = 96
    balanced: int = 64  # Z
    modifiers: int = 12  # S without the constant
    hidden: int = 128

    @property
    def features(self) -> int:
        """P, action features."""
        return equations.feature_count(self.action, self.polynomial)


class DecayEncoder(nn.Module):
    """A history as exponentially weighted means at several learned time constants, over the periods that hold data.

    Missing periods carry no weight, so padding is never read as behaviour; presence itself is pooled beside the values.
    """

    age: Tensor

    def __init__(self, sizes: Sizes, dropout: float = 0.1) -> None:
        super().__init__()
        self.row, self.dropout, self.part = sizes.row, dropout, (0, 1)  # which rows of a batch that several processes share are here: rank, of
        lives = torch.logspace(math.log10(0.5), math.log10(max(sizes.window, 2) / 2), sizes.scales)
        self.log_rate = nn.Parameter((math.log(2) / lives).log())
        self.register_buffer("age", torch.arange(sizes.window - 1, -1, -1.0), persistent=False)
        self.dense = nn.Linear(2 * sizes.scales * sizes.row, sizes.embedding)
        self.attributes = nn.Linear(max(sizes.attributes, 1), sizes.embedding // 3)
        self.norm = nn.LayerNorm(sizes.embedding + sizes.embedding // 3)

    def history(self, x: Tensor) -> Tensor:
        """x [B, W, 2F] standardised values then presence marks -> [B, scales, 2F] their means at each time constant, then how much of them is present."""
        weight = torch.exp(-self.log_rate.exp()[:, None] * self.age)  # [scales, W]
        pooled = torch.einsum("sw,bwf->bsf", weight, x)
        total, mass = pooled[..., : self.row], pooled[..., self.row :]
        return torch.cat([total / mass.clamp(min=1e-3), mass / weight.sum(-1)[:, None]], -1)

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        """x as `history` takes it, v [B, G] -> [B, embedding * 4/3]."""
        if self.training and self.dropout:  # variational: one mask per sequence, the same at all its periods (arXiv 1512.05287)
            rank, of = self.part
            keep = torch.rand(x.shape[0] * of, 1, self.row, device=x.device)[rank::of] >= self.dropout
            x = x * torch.cat([keep, keep], -1)
        if v.shape[-1] == 0:
            v = x.new_zeros(x.shape[0], 1)
        return self.norm(torch.cat([functional.silu(self.dense(self.history(x).flatten(1))), functional.silu(self.attributes(v))], -1))


class Experts(nn.Module):
    """K policy experts as one batched layer: hidden `h_p = beta_p(S)` and the policy's expected action features `phi_p(h_p)`."""

    mean: Tensor
    scale: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, k = sizes.embedding + sizes.embedding // 3, sizes.policies
        self.beta = nn.Parameter(torch.randn(k, width, sizes.expert) / math.sqrt(width))
        self.beta_bias = nn.Parameter(torch.zeros(k, sizes.expert))
        self.phi = nn.Parameter(torch.randn(k, sizes.expert, sizes.features) / math.sqrt(sizes.expert))
        self.phi_bias = nn.Parameter(torch.zeros(k, sizes.features))
        # products and cubes are larger than the action itself; the layer works in units of what was logged
        self.register_buffer("mean", torch.zeros(sizes.features))
        self.register_buffer("scale", torch.ones(sizes.features))

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """e [B, E] -> h [B, K, H], action features [B, K, P]."""
        h = functional.silu(torch.einsum("be,keh->bkh", e, self.beta) + self.beta_bias)
        return h, self.mean + self.scale * (torch.einsum("bkh,khp->bkp", h, self.phi) + self.phi_bias)


class Adversary(nn.Module):
    """Names the acting policy from the balanced state (paper: 512 -> 256 -> K, ELU); logits, never probabilities."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(sizes.balanced, sizes.hidden),
            nn.ELU(),
            nn.Linear(sizes.hidden, sizes.hidden // 2),
            nn.ELU(),
            nn.Linear(sizes.hidden // 2, sizes.policies),
        )

    def forward(self, b: Tensor) -> Tensor:
        logits: Tensor = self.layers(b)
        return logits


@dataclass
class Represented:
    """What stage 1 says of a batch of states."""

    b: Tensor  # [B, Z] balanced state
    psi: Tensor  # [B, S + 1] effect modifiers, the first is the constant 1
    expected: Tensor  # [B, K, P] each policy's expected action features here
    assignment: Tensor  # [B, K] logits: which policy acts in such a state

    def __getitem__(self, rows: slice | np.ndarray) -> Represented:
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows)
        return Represented(self.b[index], self.psi[index], self.expected[index], self.assignment[index])


class Representation(nn.Module):
    """Stage 1: encoder, policy experts, one balancing layer shared by all of them, adversary, and heads that keep what outcomes need."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = DecayEncoder(sizes)
        self.experts = Experts(sizes)
        self.balance = nn.Sequential(nn.Linear(sizes.expert, sizes.balanced), nn.ELU(), nn.LayerNorm(sizes.balanced))
        self.modifiers = nn.Linear(sizes.balanced, sizes.modifiers)
        self.adversary = Adversary(sizes)
        self.assignment = nn.Linear(sizes.embedding + sizes.embedding // 3, sizes.policies)
        # departure from the paper: b is also asked for the outcomes, or reversal alone would be free to erase them (as arXiv 2002.04083 does)
        self.baseline = nn.Sequential(nn.Linear(sizes.balanced, sizes.hidden), nn.SiLU(), nn.Linear(sizes.hidden, 2 * sizes.objectives * sizes.policies))
        self.effects = nn.Parameter(torch.zeros(2 * sizes.objectives, sizes.modifiers + 1, sizes.features))

    def forward(self, x: Tensor, v: Tensor, branch: Tensor) -> Represented:
        """x [B, W, 2F], v [B, G], branch [B, K]: weights over the expert branches, one-hot for the policy that acted last."""
        e = self.encoder(x, v)
        h, expected = self.experts(e)
        b = self.balance(torch.einsum("bk,bkh->bh", branch, h))
        psi = torch.cat([torch.ones_like(b[:, :1]), torch.tanh(self.modifiers(b))], -1)
        return Represented(b, psi, expected, self.assignment(e))

    def outcomes(self, seen: Represented, policy: Tensor, centred: Tensor) -> Tensor:
        """[B, 2M] immediate and horizon outcomes: a baseline under the acting policy [B] plus the effect of the centred action features [B, P]."""
        baseline = self.baseline(seen.b).view(len(policy), -1, self.sizes.policies)
        acting = baseline.gather(2, policy[:, None, None].expand(-1, baseline.shape[1], 1)).squeeze(2)
        return acting + torch.einsum("bs,tsp,bp->bt", seen.psi, self.effects, centred)


class Values(nn.Module):
    """Stage 2, the level: twin heads for the value and one for the immediate value of the reference action, per objective.

    A linear part, started at the fixed point of linear temporal-difference learning, plus a small network that starts at zero.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.m = sizes.objectives
        self.linear = nn.Linear(sizes.balanced, 2 * sizes.objectives)
        self.twins = nn.ModuleList(
            nn.Sequential(nn.Linear(sizes.balanced, sizes.hidden), nn.SiLU(), nn.Linear(sizes.hidden, 2 * sizes.objectives)) for _ in range(2)
        )
        for twin in self.twins:
            nn.init.normal_(twin[2].weight, std=1e-3)  # type: ignore[index]
            nn.init.zeros_(twin[2].bias)  # type: ignore[index]

    def forward(self, b: Tensor) -> Tensor:
        """b [B, Z] -> [2 twins, B, M, 2] value and immediate value at the reference action."""
        linear = self.linear(b)
        return torch.stack([linear + twin(b) for twin in self.twins]).view(2, b.shape[0], self.m, 2)


class Actor(nn.Module):
    """Stage 2, the proposal: where between the lowest and the highest action that the evidence reaches, in standard units."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(sizes.balanced, sizes.hidden), nn.SiLU(), nn.Linear(sizes.hidden, sizes.hidden), nn.SiLU(), nn.Linear(sizes.hidden, sizes.action)
        )

    def forward(self, b: Tensor, reach: Tensor) -> Tensor:
        """b [B, Z], reach [B, 2, D] -> [B, D]."""
        share = torch.sigmoid(self.layers(b))
        return reach[:, 0] + (reach[:, 1] - reach[:, 0]) * share


# ---- the published form (preset `paper`) ---------------------------------------------------------------------------------------
class VariationalLSTM(nn.Module):
    """An LSTM with one dropout mask per sequence on its input and one on its state, the same at all periods (arXiv 1512.05287)."""

    def __init__(self, inputs: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.hidden, self.dropout = hidden, dropout
        self.lstm = nn.LSTM(inputs, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, W, inputs] -> [B, hidden], the state after the last period."""
        if not (self.training and self.dropout):
            last: Tensor = self.lstm(x)[1][0][0]  # one fused call: the same arithmetic without masks
            return last
        keep = 1 - self.dropout
        x = x * (torch.rand(len(x), 1, x.shape[2], device=x.device) < keep) / keep
        mask = (torch.rand(len(x), self.hidden, device=x.device) < keep) / keep
        h = c = x.new_zeros(len(x), self.hidden)
        of_input, of_state, *biases = self.lstm.all_weights[0]
        for gates in functional.linear(x, of_input, biases[0] + biases[1]).unbind(1):
            i, f, g, o = (gates + functional.linear(h * mask, of_state)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h


class PublishedRepresentation(nn.Module):
    """Stage 1 as published: LSTM and dense embedding, K experts, one balancing layer that meets each expert's output, and the adversary.

    Widths: `Sizes` with expert 128, balanced 256, hidden 512, and an embedding of 64 + 32 (`Sizes.embedding` and a third of it are the default's).
    """

    def __init__(self, sizes: Sizes, dropout: float = 0.1) -> None:
        super().__init__()
        self.sizes, k, width = sizes, sizes.policies, 64 + 32
        self.lstm = VariationalLSTM(2 * sizes.row, 64, dropout)
        self.lstm_norm = nn.BatchNorm1d(64)
        self.attributes = nn.Sequential(nn.Linear(max(sizes.attributes, 1), 32), nn.ReLU(), nn.BatchNorm1d(32))
        self.beta = nn.ParameterList([torch.randn(k, a, b) * math.sqrt(2 / a) for a, b in ((width, 2 * sizes.expert), (2 * sizes.expert, sizes.expert))])
        self.beta_bias = nn.ParameterList([torch.zeros(k, b) for b in (2 * sizes.expert, sizes.expert)])
        self.expert_norm = nn.BatchNorm1d(k * sizes.expert)
        self.phi = nn.Parameter(torch.randn(k, sizes.expert, sizes.action) / math.sqrt(sizes.expert))
        self.phi_bias = nn.Parameter(torch.zeros(k, sizes.action))
        self.balance = nn.Sequential(nn.Linear(sizes.expert, sizes.balanced), nn.ELU(), nn.BatchNorm1d(sizes.balanced))
        self.adversary = nn.Sequential(
            nn.Linear(sizes.balanced, sizes.hidden),
            nn.ELU(),
            nn.BatchNorm1d(sizes.hidden),
            nn.Linear(sizes.hidden, sizes.hidden // 2),
            nn.ELU(),
            nn.BatchNorm1d(sizes.hidden // 2),
            nn.Linear(sizes.hidden // 2, k),
        )
        # addition: the published form cannot say who acts in which state, which evaluation and explanation ask; it learns from the embedding and moves nothing
        self.assignment = nn.Linear(width, k)

    def branches(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, W, 2F], v [B, G] -> balanced state of every branch [B, K, Z], each expert's action [B, K, D], who acts [B, K] logits."""
        if v.shape[-1] == 0:
            v = x.new_zeros(len(x), 1)
        e = torch.cat([self.lstm_norm(self.lstm(x)), self.attributes(v)], -1)
        h = torch.relu(torch.einsum("be,keh->bkh", e, self.beta[0]) + self.beta_bias[0])
        h = torch.relu(torch.einsum("bkh,khg->bkg", h, self.beta[1]) + self.beta_bias[1])
        h = self.expert_norm(h.flatten(1)).view(h.shape)
        b = torch.stack([self.balance(branch) for branch in h.unbind(1)], 1)  # one branch at a time, as published: each is normalised by itself
        return b, torch.einsum("bkh,khd->bkd", h, self.phi) + self.phi_bias, self.assignment(e.detach())

    def forward(self, x: Tensor, v: Tensor, branch: Tensor) -> Represented:
        """As `Representation`: the balanced state of the branch that `branch` [B, K] weighs; `expected` holds the experts' actions [B, K, D]."""
        b, action, assignment = self.branches(x, v)
        return Represented(torch.einsum("bk,bkz->bz", branch, b), torch.ones_like(b[:, 0, :1]), action, assignment)


class PublishedCritic(nn.Module):
    """Twin critics as published: `(Z + D) -> 512 -> 256`, batch norm; the value, and logits of its M + 1 shares from the last hidden layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        wide = sizes.hidden
        self.twins = nn.ModuleList(
            nn.Sequential(
                nn.Linear(sizes.balanced + sizes.action, wide),
                nn.BatchNorm1d(wide),
                nn.ReLU(),
                nn.Linear(wide, wide // 2),
                nn.BatchNorm1d(wide // 2),
                nn.ReLU(),
                nn.Linear(wide // 2, 1 + sizes.objectives + 1),
            )
            for _ in range(2)
        )

    def forward(self, b: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """b [B, Z], u [B, D] standard units -> values [2, B], logits of the shares [2, B, M + 1]."""
        out = torch.stack([twin(torch.cat([b, u], -1)) for twin in self.twins])
        return out[..., 0], out[..., 1:]


class PublishedActor(nn.Module):
    """The actor as published: `Z -> 512 -> 256 -> D`, without bounds."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        wide = sizes.hidden
        self.layers = nn.Sequential(nn.Linear(sizes.balanced, wide), nn.ReLU(), nn.Linear(wide, wide // 2), nn.ReLU(), nn.Linear(wide // 2, sizes.action))

    def forward(self, b: Tensor) -> Tensor:
        """b [B, Z] -> [B, D] standard units."""
        u: Tensor = self.layers(b)
        return u
