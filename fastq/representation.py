"""Stage 1: policy experts and the balanced state, trained in Lightning, then frozen.

Departures from the paper, each with its reason beside the line: the branch is the policy that acted *last* (known when serving asks),
the adversary names the policy that acts (the confounding that has to go), outcomes are predicted from the balanced state, a decay
encoder stands for the LSTM. Sizes and strengths: `networks.Sizes`, `platform.Training`.
"""

from __future__ import annotations

import abc
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as lightning
import torch
import torch.distributed
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from fastq import equations
from fastq.errors import TrainingError
from fastq.features import CLIP, Encoding, Units
from fastq.networks import PublishedRepresentation, Representation, Represented, Sizes
from fastq.platform import Training
from fastq.windows import Windows
from fastq.workspace import replacing

CONSTANT = 1e-3  # standard deviations of a history below which it does not vary
HIDDEN_LAGS = 0.25  # share of states shown without lagged actions and outcomes, as a caller may not have them
WARM_EPOCHS, WARM_PATIENCE = 2, 2  # at most, and without improvement, where training goes on from a policy: a third is worth no more (infra/log.md)
Progress = Callable[[str, int, int, dict[str, float]], None]  # stage, epochs done, epochs at most, metrics


class Batches:
    """Gathered batches of row numbers for Lightning: one permutation an epoch, decided by (seed, epoch) alone.

    `weights`, asked at the start of each epoch, are how often each row is drawn instead, with replacement; None: once.
    """

    def __init__(self, rows: Tensor, batch_size: int, seed: int, epochs_done: int, weights: Callable[[Tensor], Tensor | None] = lambda _: None) -> None:
        self.rows, self.batch_size, self.seed, self.epoch, self.weights = rows, min(batch_size, len(rows)), seed, epochs_done, weights

    def __len__(self) -> int:
        return max(len(self.rows) // self.batch_size, 1)

    def __iter__(self) -> Iterator[Tensor]:
        luck = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        weights = self.weights(self.rows)
        if weights is None:
            order = self.rows[torch.randperm(len(self.rows), generator=luck)]
        else:  # by the cumulated weights, since torch.multinomial ends at 2^24 rows
            ends = weights.double().cpu().cumsum(0)
            drawn = torch.searchsorted(ends, torch.rand(len(self.rows), generator=luck, dtype=torch.float64) * ends[-1])
            order = self.rows[drawn.clamp(max=len(self.rows) - 1)]
        self.epoch += 1
        for start in range(len(self)):
            yield order[start * self.batch_size : (start + 1) * self.batch_size]


@dataclass(frozen=True)
class StateTensors:
    """The windows of all decisions as tensors. The matrix stays where it lies, in memory or in a mapped file: a batch is gathered, then moved to the device
    where the other tensors are, and standardised there.
    """

    windows: Windows
    raw: Tensor  # [rows, F] shares the matrix's memory
    mean: Tensor  # [F]
    scale: Tensor  # [F]
    attributes: Tensor  # [N, G]
    lagged: Tensor  # [2F] bool: columns that hold lagged actions and outcomes
    k: int

    @classmethod
    def of(cls, windows: Windows, encoding: Encoding, device: torch.device) -> StateTensors:
        f, n_measures = windows.matrix.shape[1], len(windows.platform.state.measures)
        lagged = torch.arange(2 * f) % f >= n_measures
        attributes = encoding.attributes(windows.attributes, len(windows))
        mean, scale, v = (torch.from_numpy(array).to(device) for array in (encoding.mean, encoding.scale, attributes))
        return cls(windows, torch.from_numpy(windows.matrix), mean, scale, v, lagged.to(device), len(windows.policies))

    def gather(self, index: Tensor, hide: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, W, 2F], v [B, G], branch [B, K] of these decisions; `hide` [B] bool leaves out what a caller may not have."""
        at = index.cpu().numpy()
        rows = self.windows.rows_of(at)
        m, device = len(self.windows.platform.objectives), self.mean.device
        raw = self.raw.index_select(0, torch.from_numpy(rows.reshape(-1))).view(*rows.shape, -1).to(device)
        known = torch.isfinite(raw)
        known[:, :, -m:] &= torch.from_numpy(self.windows.known(at, rows)).to(device)
        # as `Encoding.rows`, which makes the rows that are served
        standard = raw.sub_(self.mean).div_(self.scale).clamp_(-CLIP, CLIP).masked_fill_(~known, 0.0)
        x = torch.cat([standard, known], -1)
        last = torch.from_numpy(self.windows.last_policy[at]).to(device)
        if hide is not None:
            x = torch.where(hide[:, None, None] & self.lagged, 0.0, x)
            last = torch.where(hide, -1, last)
        return x, self.attributes[index], branch_weights(last, self.k)


def branch_weights(last: Tensor, k: int) -> Tensor:
    """[B, K] one-hot for the policy that acted last; the mean of the branches where none did."""
    return torch.where((last >= 0)[:, None], functional.one_hot(last.clamp(min=0), k).float(), 1.0 / k)


@dataclass(frozen=True)
class Part:
    """Which part of every batch this process has, where several learn together (torch.distributed); one alone has all of it.

    Everything random is drawn for the whole batch and every mean is over the whole batch, so that together they do what one would do alone, to rounding.
    """

    rank: int = 0
    of: int = 1

    def mine(self, batch: Tensor) -> Tensor:
        return batch[self.rank :: self.of]

    def share(self, known: Tensor) -> Tensor:
        """What the mean over this part's known entries weighs, so that the mean of all parts' losses is the one over all known entries."""
        return self.mine(known).sum() * self.of / known.sum().clamp(min=1)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Their mean over all processes, in place and in one message."""
        if self.of > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors]) / self.of
            torch.distributed.all_reduce(flat)
            for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(piece.view_as(tensor))

    def average_gradients(self, network: torch.nn.Module) -> None:
        self.average([p.grad for p in network.parameters() if p.grad is not None])


ALONE = Part()


@dataclass(frozen=True)
class Lesson:
    """What one training learns from and how it goes on: the players who are not held out for evaluation.

    rows: decisions that are learned from; checked: those that only tell when to stop; both are `learned`. records: where the two stages keep theirs.
    """

    windows: Windows
    encoding: Encoding
    units: Units
    rows: np.ndarray
    checked: np.ndarray
    learned: np.ndarray
    records: tuple[Path | None, Path | None]
    resume: bool
    on_progress: Progress | None
    part: Part = ALONE


class Stage(lightning.LightningModule, abc.ABC):
    """One stage of training, as `fit` and its record know it: where it is, what it was worth after each epoch, and its best weights so far."""

    best_weights: dict[str, Tensor]  # set where the networks are

    def __init__(self, validation: Tensor, *, seed: int, epochs: int, learning_rate: float, part: Part = ALONE) -> None:
        super().__init__()
        self.validation, self.part = validation, part
        self.seed, self.epochs, self.lr = seed, epochs, learning_rate
        self.epochs_done, self.best, self.stale = 0, math.inf, 0
        self.history: list[dict[str, float]] = []
        self.each_epoch: Callable[[Stage], None] = lambda _: None
        self.optimizers_: list[torch.optim.Optimizer] = []

    @abc.abstractmethod
    def new_optimizers(self) -> list[torch.optim.Optimizer]:
        """As they are before the first step, one for each network that is stepped by itself."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The same ones whenever they are asked for: those that a record filled are those that Lightning takes."""
        self.optimizers_ = self.optimizers_ or self.new_optimizers()
        return self.optimizers_

    def row_weights(self, rows: Tensor) -> Tensor | None:
        """[rows] how often each is drawn in the next epoch; None: once."""
        return None


class RepresentationModule(Stage):
    """One update: experts' regression, outcomes, assignment, and the adversary behind a reversed gradient, in one loss."""

    def __init__(
        self,
        network: Representation,
        states: StateTensors,
        targets: dict[str, Tensor],
        validation: Tensor,
        *,
        seed: int,
        epochs: int,
        learning_rate: float,
        balance: float,
        part: Part = ALONE,
    ) -> None:
        super().__init__(validation, seed=seed, epochs=epochs, learning_rate=learning_rate, part=part)
        self.network, self.states, self.targets, self.final_balance = network, states, targets, balance
        self.best_weights = {name: value.clone() for name, value in network.state_dict().items()}

    def new_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.network.parameters(), lr=self.lr, weight_decay=1e-3, fused=True)]

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(1_000_003 * self.seed + self.epochs_done)  # so that a resumed epoch draws what the stopped one drew

    def losses(self, index: Tensor, hide: Tensor | None, lam: float) -> tuple[Represented, dict[str, Tensor]]:
        seen: Represented = self.network(*self.states.gather(index, hide))
        policy = self.targets["policy"][index]
        acting = seen.expected.detach().gather(1, policy[:, None, None].expand(-1, 1, seen.expected.shape[2])).squeeze(1)
        centred = self.targets["features"][index] - acting
        return seen, {
            "experts": equations.masked_squared_error(seen.expected / self.network.experts.scale, self.targets["proposed"][index] / self.network.experts.scale),
            "outcomes": equations.masked_squared_error(self.network.outcomes(seen, policy, centred), self.targets["outcomes"][index]),
            "assignment": functional.cross_entropy(seen.assignment, policy),
            "adversary": functional.cross_entropy(self.network.adversary(equations.reverse_gradient(seen.b, lam)), policy),
        }

    def training_step(self, index: Tensor) -> Tensor:
        hide, part = torch.rand(len(index), device=self.device) < HIDDEN_LAGS, self.part
        # the reversal's strength is in the gradient, so the adversary itself always learns at full speed
        _, losses = self.losses(part.mine(index), part.mine(hide), equations.reversal_strength(self.epochs_done / self.epochs, self.final_balance))
        if part.of > 1:
            for name, target in (("experts", "proposed"), ("outcomes", "outcomes")):
                losses[name] = losses[name] * part.share(torch.isfinite(self.targets[target][index]))
        return losses["experts"] + losses["outcomes"] + 0.2 * losses["assignment"] + losses["adversary"]

    def on_after_backward(self) -> None:
        self.part.average_gradients(self.network)

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        self.network.eval()
        totals: dict[str, float] = {}
        chunks = self.validation.split(8192)
        for chunk in chunks:
            _, losses = self.losses(chunk, None, 0.0)
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + float(loss) * len(chunk) / len(self.validation)
        self.network.train()
        if not all(map(math.isfinite, totals.values())):
            raise TrainingError(f"stage 1 diverged in epoch {self.epochs_done + 1}: {totals}; lower training.learning_rate")
        self.epochs_done += 1
        self.history.append(totals)
        score = totals["experts"] + totals.get("outcomes", 0.0)  # the published form asks for none
        if score < self.best - 1e-4:
            self.best, self.stale = score, 0
            self.best_weights = {name: value.clone() for name, value in self.network.state_dict().items()}
        else:
            self.stale += 1
        self.each_epoch(self)


class EachEpoch:
    """What follows an epoch: the record is kept, the progress told, and training stops when held-out players have stopped improving.

    Called by the module itself at the end of its hook; Lightning would run a callback's hook before it.
    """

    def __init__(self, stage: str, record: Path | None, patience: int, on_progress: Progress | None, part: Part = ALONE) -> None:
        self.stage, self.record, self.patience, self.on_progress, self.part = stage, record, patience, on_progress, part

    def __call__(self, module: Stage) -> None:
        if self.record is not None and self.part.rank == 0:
            save_record(self.record, module)
        if self.on_progress is not None and self.part.rank == 0:
            self.on_progress(self.stage, module.epochs_done, module.epochs, module.history[-1])
        module.trainer.should_stop = module.trainer.should_stop or module.stale >= self.patience


def save_record(path: Path, module: Stage) -> None:
    """The whole learner in one safetensors file: networks, targets, best weights, optimisers, epoch; written whole or not at all."""
    tensors = {f"net.{name}": value for name, value in module.state_dict().items()} | {f"best.{name}": value for name, value in module.best_weights.items()}
    groups = []
    for i, optimizer in enumerate(module.optimizers_):
        state = optimizer.state_dict()
        groups.append(state["param_groups"])
        tensors |= {f"opt{i}.{parameter}.{name}": torch.as_tensor(value) for parameter, values in state["state"].items() for name, value in values.items()}
    kept = {"epochs_done": module.epochs_done, "best": module.best, "stale": module.stale, "history": module.history, "groups": groups}
    with replacing(path) as partial:
        save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, partial, metadata={"record": json.dumps(kept)})


def load_record(path: Path, module: Stage) -> None:
    """Put a module, whose optimisers are made, back to where `save_record` left it."""
    with safe_open(path, "pt") as file:
        kept = json.loads(file.metadata()["record"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors file is no mapping
    module.load_state_dict({name.removeprefix("net."): value for name, value in tensors.items() if name.startswith("net.")})
    module.best_weights = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
    module.epochs_done, module.best, module.stale, module.history = kept["epochs_done"], kept["best"], kept["stale"], kept["history"]
    for i, optimizer in enumerate(module.optimizers_):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"opt{i}."):
                _, parameter, field = name.split(".", 2)
                state.setdefault(int(parameter), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": kept["groups"][i]})


def fit(module: Stage, rows: Tensor, batch_size: int, each_epoch: EachEpoch, *, resume: bool) -> None:
    """Run a Lightning module to its last epoch, on the device where it is, from its record if there is one to resume; it ends on the processor.

    Where several learn together, the first one keeps the record.
    """
    module.each_epoch = each_epoch
    module.configure_optimizers()
    if resume and each_epoch.record is not None and each_epoch.record.exists():
        load_record(each_epoch.record, module)
    if module.epochs_done >= module.epochs or module.stale >= each_epoch.patience:
        module.cpu()
        return
    trainer = lightning.Trainer(
        max_epochs=module.epochs - module.epochs_done,
        accelerator=module.device.type,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, Batches(rows, batch_size, module.seed, module.epochs_done, module.row_weights))


def device_of(training: Training) -> torch.device:
    """Where networks learn (`training.accelerator`). Raises `TrainingError` where CUDA is asked for and PyTorch finds none."""
    if training.accelerator == "cuda" and not torch.cuda.is_available():
        raise TrainingError("training.accelerator: cuda: PyTorch finds no CUDA device here; expected cpu or auto, or a PyTorch that was built for CUDA")
    here = training.accelerator == "cuda" or (training.accelerator == "auto" and training.workers == 1 and torch.cuda.is_available())
    return torch.device("cuda" if here else "cpu")


def outcome_targets(windows: Windows, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Immediate values [N, M] and discounted sums over `horizon` decisions [N, M]; NaN where not known."""
    summed = equations.horizon_return(windows.reward, windows.discount, windows.following, windows.open_ended, np.zeros_like(windows.reward), horizon)
    return windows.reward, summed


def train_representation(
    windows: Windows,
    encoding: Encoding,
    units: Units,
    training_rows: np.ndarray,
    validation_rows: np.ndarray,
    *,
    record: Path | None = None,
    resume: bool = False,
    on_progress: Progress | None = None,
    start: Representation | None = None,
    part: Part = ALONE,
) -> tuple[Representation, StateTensors, list[dict[str, float]]]:
    """Stage 1 on these decisions; early stopping on the validation players. Returns the frozen network, the tensors and the history.

    `start` is a network of the same encoding and units that saw fewer decisions: training goes on from it, and is sooner said to have stopped improving.
    """
    training = windows.platform.training
    device = device_of(training)
    polynomial = windows.catalogue is None
    sizes = Sizes(
        windows.platform.state.window,
        windows.matrix.shape[1],
        encoding.attribute_width,
        len(windows.policies),
        windows.action.shape[1],
        polynomial,
        len(windows.platform.objectives),
    )
    torch.manual_seed(training.seed)
    network = Representation(sizes)
    states = StateTensors.of(windows, encoding, device)
    outcomes = np.concatenate(outcome_targets(windows, training.horizon), 1)
    with np.errstate(invalid="ignore"):
        mean, scale = np.nanmean(outcomes[training_rows], 0), np.nanstd(outcomes[training_rows], 0)
    outcomes = (outcomes - np.nan_to_num(mean)) / np.where(scale > 1e-9, scale, 1.0)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.float32)).to(device)

    targets = {
        "policy": torch.from_numpy(windows.policy).to(device),
        "features": torch.nan_to_num(equations.action_features(tensor(units.standard(windows.action)), polynomial)),
        "proposed": equations.action_features(tensor(units.standard(windows.proposals)), polynomial),
        "outcomes": tensor(outcomes),
    }
    logged = targets["features"][torch.from_numpy(training_rows).to(device)]
    network.experts.mean.copy_(logged.mean(0))
    network.experts.scale.copy_(logged.std(0).clamp(min=1e-3))
    if start is not None:
        network.load_state_dict(start.state_dict())
    module = RepresentationModule(
        network,
        states,
        targets,
        torch.from_numpy(validation_rows).to(device),
        seed=training.seed,
        epochs=training.epochs if start is None else min(training.epochs, WARM_EPOCHS),
        learning_rate=training.learning_rate,
        balance=training.balance,
        part=part,
    ).to(device)
    network.encoder.part = (part.rank, part.of)
    fit(
        module,
        torch.from_numpy(training_rows),
        training.batch_size,
        EachEpoch("representation", record, 5 if start is None else WARM_PATIENCE, on_progress, part),
        resume=resume,
    )
    network = network.to(device)
    network.load_state_dict(module.best_weights)
    return network.eval().requires_grad_(False), states, module.history


@torch.no_grad()
def represent(network: Representation | PublishedRepresentation, states: StateTensors, index: np.ndarray | None = None, chunk: int = 4096) -> Represented:
    """The frozen representation of decisions, computed once and kept."""
    rows = torch.arange(len(states.windows)) if index is None else torch.from_numpy(index)
    parts = [network(*states.gather(piece.to(states.mean.device))) for piece in rows.split(chunk)]
    return Represented(*(torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("b", "psi", "expected", "assignment")))


@torch.no_grad()
def histories(network: Representation, states: StateTensors, rows: np.ndarray, chunk: int = 4096) -> np.ndarray:
    """[n, H] float32: what lies behind these decisions, at all time constants of the encoder, and who acted last; standardised, what never varies left out."""
    parts = []
    for piece in torch.from_numpy(rows).split(chunk):
        x, _, last = states.gather(piece.to(states.mean.device))
        parts.append(torch.cat([network.encoder.history(x).flatten(1), last], -1).cpu())
    found = torch.cat(parts)
    scale, mean = torch.std_mean(found, 0, correction=0)
    varies = scale > CONSTANT
    return found[:, varies].sub_(mean[varies]).div_(scale[varies]).clamp_(-CLIP, CLIP).numpy()
