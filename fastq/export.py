"""A policy as ONNX graphs, for a runtime that is not ours: raw windows in, the noise-free action and the value's exact parts out.

recommend.onnx   the best action of each state inside the caller's limits (of a catalogue: the ranking and the law among eligible items) and its parts
score.onnx       the parts of actions that the caller names, for what-if questions and contrasts
model.json       every input and output with dtype, shape, unit and what stands for "not known"; the law of the noise; what is left out; checksums
example.json     some states and what our own runtime answers to them, so that a port can be checked where fastq is not installed

The graphs are traced from the very functions that serve (`Policy.situation`, `Policy.best_units`); only what turns raw units into the networks' inputs,
which is NumPy there, is written again here. Before anything is left behind, onnxruntime is asked the example and other states, and has to agree.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastq.equations import action_features
from fastq.errors import BundleError, ConfigurationError
from fastq.features import CLIP, PlayerStates
from fastq.platform import CatalogueAction
from fastq.policy import CHUNKS, NEAREST_ITEMS, UNIFORM_SHARE, Encoded, Policy, Situation
from fastq.representation import branch_weights
from fastq.workspace import replacing

OPSET = 18
LARGEST_BATCH = CHUNKS[-1]  # states in one call of a graph: candidates of all of them are in memory at once
TOLERANCE = 1e-5  # of max(1, |number|): the networks are float32, everything after them float64
CHECKED = 256  # states that onnxruntime is asked before the files are left behind
EXAMPLES = 4  # of them in example.json
NEEDED = ("onnx", "onnxscript", "onnxruntime")


class Inputs(nn.Module):
    """Raw units to the networks' inputs: what `Policy.encode` does, in tensors."""

    mean: Tensor
    scale: Tensor
    embedding: Tensor

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy, encoding = policy, policy.encoding
        self.register_buffer("mean", torch.from_numpy(encoding.mean))
        self.register_buffer("scale", torch.from_numpy(encoding.scale))
        if policy.catalogue is not None:  # the last row stands for "nothing was shown"
            table = np.concatenate([policy.catalogue.embedding, np.full((1, policy.catalogue.embedding.shape[1]), np.nan)])
            self.register_buffer("embedding", torch.from_numpy(table.astype(np.float32)))

    def forward(self, given: dict[str, Tensor]) -> Encoded:
        encoding, history = self.policy.encoding, given["history"]
        actions = given["actions"]
        if self.policy.catalogue is not None:
            actions = self.embedding[torch.where(actions < 0, len(self.policy.catalogue.ids), actions)]
        raw = torch.cat([history, actions, given["objectives"]], -1)
        known = torch.isfinite(raw)
        standard = torch.where(known, ((raw - self.mean) / self.scale).clamp(-CLIP, CLIP), 0.0)
        x = torch.cat([standard, known.float()], -1)
        # fewer periods than the window are its newest ones; what came before them is not known
        window = self.policy.platform.state.window
        x = torch.cat([x.new_zeros(x.shape[0], window, x.shape[2]), x], 1)[:, -window:]
        columns = []
        for j, (mean, scale) in enumerate(encoding.numeric.values()):
            value = given["numeric"][:, j]
            seen = torch.isfinite(value)
            columns += [torch.where(seen, ((value - mean) / scale).clamp(-CLIP, CLIP), 0.0).float()[:, None], seen.float()[:, None]]
        for j, values in enumerate(encoding.vocabularies.values()):
            columns.append(nn.functional.one_hot(given["categorical"][:, j], 1 + len(values)).float())
        v = torch.cat(columns, -1) if columns else x.new_zeros(x.shape[0], 0)
        return Encoded(x, v, branch_weights(given["last_policy"], len(self.policy.policies)))


class Graph(nn.Module):
    """What both graphs share: the state's situation, and an action's parts and price in it."""

    def __init__(self, policy: Policy, names: list[str]) -> None:
        super().__init__()
        self.policy, self.names, self.inputs = policy, names, Inputs(policy)
        self.network, self.values, self.actor = policy.network, policy.values, policy.actor  # so that their weights are the graph's
        self.weights = policy.platform.weights

    def situation(self, tensors: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], Situation]:
        given = dict(zip(self.names, tensors, strict=True))
        return given, self.policy.situation(self.inputs(given))

    def parts(self, at: Situation, phi: Tensor) -> tuple[Tensor, ...]:
        """value [B, C], by_objective [B, C, M], parts [B, C, M, 2] weighted, caution [B, C], guardrail [B, C] of candidates [B, C, P]."""
        totals = self.policy.totals(at, phi)
        weights = torch.from_numpy(self.weights)
        scores = self.policy._scores(at, phi, self.weights, self.policy.shape_of_doubt(at, self.weights))  # noqa: SLF001 - one definition of what ranks
        parts = torch.stack([totals[..., 1], totals[..., 0] - totals[..., 1]], -1) * weights[:, None]
        return totals[..., 0] @ weights, totals[..., 0], parts, scores["caution"], scores["guardrail"]


class Recommend(Graph):
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given, at = self.situation(tensors)
        if self.policy.catalogue is not None:
            return self.items(at, given["eligible"])
        low, high = self.limits(given)
        # limits narrow how far candidates may go, as they do in `best_units`
        centre, width = torch.from_numpy(self.policy.units.centre), torch.from_numpy(self.policy.units.width)
        edges = [((edge - centre) / width)[:, None] for edge in (low, high)]
        within = replace(at, reach=torch.minimum(torch.maximum(at.reach, edges[0]), edges[1]))
        u = self.policy.best_units(within, self.weights, *self.policy.platform.bounds.T)
        action = self.on_grid(centre + width * u, low, high)
        phi = action_features((action - centre) / width, True)[:, None]
        return action, *(part[:, 0] for part in self.parts(at, phi))

    def limits(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As `Policy.edges`: inside the platform's bounds, and on the grid of a dimension that has a step."""
        lowest, highest = (torch.from_numpy(np.ascontiguousarray(edge)) for edge in self.policy.platform.bounds.T)
        low, high = torch.maximum(given["low"], lowest), torch.minimum(given["high"], highest)
        step = torch.from_numpy(self.policy.platform.steps)
        width = torch.where(step > 0, step, 1.0)
        up, down = lowest + torch.ceil((low - lowest) / width - 1e-9) * width, lowest + torch.floor((high - lowest) / width + 1e-9) * width
        return torch.where(step > 0, up, low), torch.where(step > 0, down, high)

    def on_grid(self, action: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """As `Policy.on_grid`."""
        step, origin = torch.from_numpy(self.policy.platform.steps), torch.from_numpy(np.ascontiguousarray(self.policy.platform.bounds[:, 0]))
        width = torch.where(step > 0, step, 1.0)
        snapped = torch.where(step > 0, origin + torch.round((action - origin) / width) * width, action)
        return torch.minimum(torch.maximum(snapped, low), high)

    def items(self, at: Situation, eligible: Tensor) -> tuple[Tensor, ...]:
        """The eligible items nearest to what is proposed, re-ranked; as `Policy.item_scores` and `Policy.item_law`."""
        assert self.policy.catalogue is not None
        vectors = torch.from_numpy(self.policy.catalogue.embedding).double()
        near = min(len(vectors), NEAREST_ITEMS)
        centres = torch.cat([at.proposal[:, None], at.expected], 1)
        apart = (centres.square().sum(-1)[..., None] + vectors.square().sum(-1) - 2 * centres @ vectors.T).amin(1)
        items = torch.where(eligible, apart, torch.inf).topk(near, largest=False).indices
        allowed, candidates = eligible.gather(1, items), vectors[items]
        doubt = self.policy.shape_of_doubt(at, self.weights)
        total = torch.where(allowed, self.policy._scores(at, candidates, self.weights, doubt)["total"], -torch.inf)  # noqa: SLF001 - as in `parts`
        spread = torch.from_numpy(self.policy.catalogue.embedding.std(0)).double()
        temperature = torch.einsum("p,bpq,q->b", spread, doubt, spread).clamp(min=1e-12).sqrt()
        # as tensors: the exporter would write a Python number as float32
        floor = torch.tensor(UNIFORM_SHARE if self.policy.platform.serving.exploration > 0 else 0.0, dtype=torch.float64)
        law = (1 - floor) * torch.softmax(total / temperature[:, None], 1) + floor * allowed.double() / allowed.sum(1, keepdim=True)
        order = total.topk(near).indices
        ranking = torch.where(allowed.gather(1, order), items.gather(1, order), -1)
        best = vectors[ranking[:, 0].clamp(min=0)][:, None]
        return ranking, law.gather(1, order), *(part[:, 0] for part in self.parts(at, best))


class Score(Graph):
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given, at = self.situation(tensors)
        if self.policy.catalogue is not None:
            return self.parts(at, torch.from_numpy(self.policy.catalogue.embedding).double()[given["candidates"]])
        centre, width = torch.from_numpy(self.policy.units.centre), torch.from_numpy(self.policy.units.width)
        return self.parts(at, action_features((given["candidates"] - centre) / width, True))


# ---- what goes in and comes out ------------------------------------------------------------------------------------------
def inputs_of(policy: Policy) -> dict[str, dict[str, Any]]:
    """The inputs of both graphs, in order: dtype, shape, meaning, columns, and what stands for "not known"."""
    platform, encoding = policy.platform, policy.encoding
    measures, objectives = list(platform.state.measures), list(platform.objectives)
    history = {"dtype": "float32", "unknown": "NaN"}
    inputs: dict[str, dict[str, Any]] = {
        "history": {**history, "shape": ["batch", "periods", len(measures)], "columns": measures, "says": "measures per period, oldest first, raw units"}
    }
    if policy.catalogue is None:
        inputs["actions"] = {
            **history, "shape": ["batch", "periods", len(platform.dimension_names)], "columns": platform.dimension_names, "units": _units(policy),
            "says": "what was done in each period",
        }  # fmt: skip
    else:
        inputs["actions"] = {"dtype": "int64", "unknown": -1, "shape": ["batch", "periods"], "says": "position in `items` of what was shown in each period"}
    inputs["objectives"] = {
        **history, "shape": ["batch", "periods", len(objectives)], "columns": objectives,
        "says": "what followed in each period, NaN as long as it is not known (known_after)",
    }  # fmt: skip
    inputs["last_policy"] = {
        "dtype": "int64", "unknown": -1, "shape": ["batch"], "values": policy.policies, "says": "position in `values` of the policy that acted last",
    }  # fmt: skip
    if encoding.numeric:
        inputs["numeric"] = {
            "dtype": "float64",
            "unknown": "NaN",
            "shape": ["batch", len(encoding.numeric)],
            "columns": list(encoding.numeric),
            "says": "attributes",
        }
    if encoding.vocabularies:
        inputs["categorical"] = {
            "dtype": "int64", "unknown": 0, "shape": ["batch", len(encoding.vocabularies)], "columns": list(encoding.vocabularies),
            "values": encoding.vocabularies, "says": "attributes: 1 + position in `values`; 0 for a value that is not there",
        }  # fmt: skip
    return inputs


def asked_of(policy: Policy) -> dict[str, dict[str, dict[str, Any]]]:
    """Per graph the inputs beyond those of the state."""
    if policy.catalogue is not None:
        count = len(policy.catalogue.ids)
        return {
            "recommend": {"eligible": {"dtype": "bool", "shape": ["batch", count], "says": "which items may be recommended, at least one each"}},
            "score": {"candidates": {"dtype": "int64", "shape": ["batch", "candidates"], "says": "positions in `items`"}},
        }
    d = len(policy.platform.dimension_names)
    dimension = {"dtype": "float64", "shape": ["batch", d], "columns": policy.platform.dimension_names, "units": _units(policy)}
    low, high = policy.platform.bounds.T.tolist()
    return {
        "recommend": {
            "low": {**dimension, "otherwise": low, "says": "limits of the request; without any, the platform's bounds. At most `high`"},
            "high": {**dimension, "otherwise": high, "says": "the same"},
        },
        "score": {"candidates": {**dimension, "shape": ["batch", "candidates", d], "says": "actions in raw units"}},
    }


def outputs_of(policy: Policy) -> dict[str, dict[str, dict[str, Any]]]:
    """Per graph the outputs, in order."""
    m, objectives = len(policy.platform.objectives), list(policy.platform.objectives)

    def parts(*lead: str) -> dict[str, dict[str, Any]]:
        number = {"dtype": "float64", "shape": list(lead)}
        return {
            "value": {**number, "says": "expected discounted sum of the weighted objectives: the sum of `parts`"},
            "by_objective": {**number, "shape": [*lead, m], "columns": objectives, "says": "the same per objective, in its own unit, not weighted"},
            "parts": {**number, "shape": [*lead, m, 2], "columns": objectives, "horizons": ["immediate", "long_term"], "says": "weighted"},
            "caution": {**number, "says": "doubt subtracted from `value` when actions are ranked"},
            "guardrail": {**number, "says": "the guardrails' price, subtracted too"},
        }

    if policy.catalogue is None:
        d = len(policy.platform.dimension_names)
        action = {
            "dtype": "float64",
            "shape": ["batch", d],
            "columns": policy.platform.dimension_names,
            "units": _units(policy),
            "says": "the noise-free action",
        }
        return {"recommend": {"action": action, **parts("batch")}, "score": parts("batch", "candidates")}
    near = min(len(policy.catalogue.ids), NEAREST_ITEMS)
    ranking = {
        "ranking": {"dtype": "int64", "shape": ["batch", near], "says": "positions in `items`, best first; -1 where fewer are eligible"},
        "law": {"dtype": "float64", "shape": ["batch", near], "says": "probability with which each of them is served, 0 for those that are not eligible"},
    }
    return {"recommend": {**ranking, **parts("batch")}, "score": parts("batch", "candidates")}


def _units(policy: Policy) -> list[str]:
    action = policy.platform.action
    return [] if isinstance(action, CatalogueAction) else [d.unit for d in action.dimensions.values()]


def law_of(policy: Policy) -> dict[str, Any]:
    """How what is served is drawn around the graph's answer, so that a host can draw it and log its propensity."""
    share = policy.platform.serving.exploration
    if policy.catalogue is not None:
        says = "draw an item with the probabilities `law`; that of the one drawn is its propensity"
        return {"exploration": share, "says": says if share > 0 else "exploration is 0: the first of `ranking` is served, and has no propensity"}
    low, high = policy.platform.bounds.T
    sd, left, right = policy.law(low, high, share)
    return {
        "exploration": share, "sd": sd.tolist(), "left": left.tolist(), "right": right.tolist(), "step": policy.platform.steps.tolist(),
        "says": "per dimension a normal around `action` with this sd, truncated to left..right (limits of a request, widened by half a step) and renormalised; "
        "on a dimension with a step, drawn, rounded to the grid, its density the mass of the cell over the step. The product over dimensions is the propensity",
    }  # fmt: skip


LEFT_OUT = [
    "the noise: `law` says how to draw it; the graphs are deterministic",
    "reading logs and making the windows: which events a period sums up, and what was known when",
    "intervals, attributions, nearest decisions and the rest of an explanation",
    "holdout, exclusions, frequency caps, budgets, pauses: what serving decides around the model (budgets are `high`)",
    "training: the weights are frozen",
]


# ---- writing it --------------------------------------------------------------------------------------------------------------
def export_onnx(policy: Policy, directory: Path) -> dict[str, Any]:
    """Write the two graphs, their description and an example into `directory`; returns what was written and how near onnxruntime came to us.

    Raises `ConfigurationError` where the packages of `fastq[onnx]` are missing or the model is of the preset `paper`, `BundleError` where onnxruntime does
    not answer as we do.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigurationError(f"export: {', '.join(missing)} is not installed; pip install 'fastq[onnx]'")
    if type(policy) is not Policy:
        raise ConfigurationError("export: the published form (training.preset: paper) stays here; expected a model of the preset default")
    directory.mkdir(parents=True, exist_ok=True)
    policy.network.eval()
    state, asked, answers = inputs_of(policy), asked_of(policy), outputs_of(policy)
    states, codes = example_states(policy, CHECKED)
    questions = {name: codes | example_questions(policy, name, CHECKED) for name in asked}
    ours = {"recommend": our_recommendations(policy, states), "score": our_scores(policy, states, questions["score"]["candidates"])}
    digests, furthest = {}, 0.0
    for name, graph in (("recommend", Recommend), ("score", Score)):
        names = [*state, *asked[name]]
        with replacing(directory / f"{name}.onnx") as partial:
            write_graph(graph(policy, names), {key: questions[name][key][:5] for key in names}, state | asked[name], list(answers[name]), partial)
            furthest = max(furthest, compare(partial, questions[name], ours[name], policy))
            digests[f"{name}.onnx"] = hashlib.sha256(partial.read_bytes()).hexdigest()
    example = {
        name: {
            "inputs": {key: _plain(questions[name][key][:EXAMPLES]) for key in [*state, *asked[name]]},
            "outputs": {key: _plain(value[:EXAMPLES]) for key, value in ours[name].items()},
        }
        for name in asked
    }
    with replacing(directory / "example.json") as partial:
        partial.write_text(json.dumps(example, allow_nan=False), encoding="utf-8")
    tree = {
        "format": 1,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": policy.platform.platform,
        "model_version": policy.version,
        "features": policy.fingerprint,
        "opset": OPSET,
        "largest_batch": LARGEST_BATCH,
        "window": policy.platform.state.window,
        "period_seconds": policy.platform.state.period.total_seconds(),
        "objectives": {name: {"weight": o.weight, "discount": o.discount} for name, o in policy.platform.objectives.items()},
        "graphs": {name: {"file": f"{name}.onnx", "inputs": state | asked[name], "outputs": answers[name]} for name in asked},
        **({"items": policy.catalogue.ids} if policy.catalogue is not None else {}),
        "law": law_of(policy),
        "left_out": LEFT_OUT,
        "tolerance": TOLERANCE,
        "example": f"example.json holds {EXAMPLES} states; null is NaN there. What onnxruntime answers agrees to `tolerance` of max(1, |number|)",
        "files": digests,
    }
    with replacing(directory / "model.json") as partial:
        partial.write_text(json.dumps(tree, indent=1, allow_nan=False), encoding="utf-8")
    return {
        "out": str(directory),
        "files": ["recommend.onnx", "score.onnx", "model.json", "example.json"],
        "model_version": policy.version,
        "opset": OPSET,
        "parity": {"states": CHECKED, "largest_difference": furthest, "tolerance": TOLERANCE},
    }


def write_graph(graph: Graph, example: dict[str, np.ndarray], described: dict[str, dict[str, Any]], outputs: list[str], path: Path) -> None:
    """Trace a graph on an example of five states; batch, periods and candidates stay open."""
    policy = graph.policy
    _ = policy._joint  # noqa: SLF001 - worked out before it is traced: it is a constant
    sizes = {
        "batch": torch.export.Dim("batch", min=1, max=LARGEST_BATCH),
        "periods": torch.export.Dim("periods", min=1, max=max(policy.platform.state.window, 2)),
        "candidates": torch.export.Dim("candidates", min=1, max=4096),
    }
    shapes = tuple({axis: sizes[size] for axis, size in enumerate(described[name]["shape"]) if isinstance(size, str)} for name in graph.names)
    tensors = tuple(torch.from_numpy(np.ascontiguousarray(openable(example[name], described[name]["shape"]))) for name in graph.names)
    with quietly(), torch.no_grad():
        program = torch.onnx.export(
            graph.eval(), tensors, dynamo=True, dynamic_shapes=(shapes,), input_names=graph.names, output_names=outputs, opset_version=OPSET, verbose=False,
            external_data=False, optimize=True,
        )  # fmt: skip
    assert program is not None
    program.save(str(path))


def openable(array: np.ndarray, shape: list[int | str]) -> np.ndarray:
    """An example of which no axis that shall stay open is one long: the exporter would take it for a constant."""
    return np.tile(array, [2 if isinstance(size, str) and length == 1 else 1 for size, length in zip(shape, array.shape, strict=True)])


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """The exporter tells of every package that it does without."""
    said = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in said]
    for logger in said:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of its own insides helps nobody
            yield
    finally:
        for logger, level in zip(said, levels, strict=True):
            logger.setLevel(level)


# ---- the check ---------------------------------------------------------------------------------------------------------------
def example_states(policy: Policy, n: int, seed: int = 0) -> tuple[PlayerStates, dict[str, np.ndarray]]:
    """States drawn around what training saw, with gaps, as `Policy.recommend` takes them and as the graphs do."""
    rng, platform, encoding = np.random.default_rng(seed), policy.platform, policy.encoding
    window, f = platform.state.window, len(encoding.mean)
    raw = (encoding.mean + encoding.scale * rng.normal(size=(n, window, f))).astype(np.float32)
    begun = rng.integers(0, window + 1, n)  # some are new
    raw[(np.arange(window) < begun[:, None])[:, :, None] & np.ones(f, bool)] = np.nan
    raw[rng.random((n, window)) < 0.2] = np.nan
    history, actions, objectives = np.split(raw, [len(platform.state.measures), f - len(platform.objectives)], 2)
    inputs: dict[str, np.ndarray] = {"history": history, "objectives": objectives}
    if policy.catalogue is None:
        inputs["actions"] = actions
    else:
        items = np.where(rng.random((n, window)) < 0.3, -1, rng.integers(0, len(policy.catalogue.ids), (n, window)))
        table = np.concatenate([policy.catalogue.embedding, np.full((1, f - history.shape[2] - objectives.shape[2]), np.nan)])
        actions, inputs["actions"] = table[items].astype(np.float32), items
    last = rng.integers(-1, len(policy.policies), n)
    inputs["last_policy"] = last
    columns: dict[str, np.ndarray | list[str | None]] = {}
    if encoding.numeric:
        means, scales = np.array(list(encoding.numeric.values())).T
        inputs["numeric"] = np.where(rng.random((n, len(means))) < 0.1, np.nan, means + scales * rng.normal(size=(n, len(means))))
        columns |= {name: inputs["numeric"][:, j] for j, name in enumerate(encoding.numeric)}
    if encoding.vocabularies:
        inputs["categorical"] = np.stack([rng.integers(0, 1 + len(values), n) for values in encoding.vocabularies.values()], 1)
        for j, (name, values) in enumerate(encoding.vocabularies.items()):
            columns[name] = [[None, *values][code] for code in inputs["categorical"][:, j]]
    names = [policy.policies[k] if k >= 0 else None for k in last]
    return PlayerStates(history, columns or None, actions, objectives, names), inputs


def example_questions(policy: Policy, graph: str, n: int, seed: int = 1) -> dict[str, np.ndarray]:
    """What a graph is asked beside the state."""
    rng = np.random.default_rng(seed)
    if policy.catalogue is not None:
        count = len(policy.catalogue.ids)
        return {"eligible": np.ones((n, count), bool)} if graph == "recommend" else {"candidates": rng.integers(0, count, (n, min(3, count)))}
    low, high = policy.platform.bounds.T
    if graph == "recommend":
        return {"low": np.tile(low, (n, 1)), "high": np.tile(high, (n, 1))}
    return {"candidates": rng.uniform(low, high, (n, 3, len(low)))}


def our_recommendations(policy: Policy, states: PlayerStates) -> dict[str, np.ndarray]:
    """What `Policy.recommend` and `Policy.score` answer, under the names of recommend.onnx."""
    found = policy.recommend(states, explore=False)
    at = policy.situations(policy.encode(states))
    actions = policy.as_actions(found.action.tolist() if policy.catalogue is not None else found.action)[:, None]
    scores = policy.score(at, actions)
    parts = policy.parts(at, actions)[:, 0] * policy.platform.weights[:, None]
    answer: dict[str, np.ndarray] = {"action": found.action}
    if policy.catalogue is not None:
        total, items = policy.item_scores(at, policy.platform.weights, None)
        law, order = policy.item_law(total, at, policy.platform.serving.exploration), total.topk(total.shape[1]).indices
        answer = {"ranking": np.take_along_axis(items, order.numpy(), 1), "law": law.gather(1, order).numpy()}
    return answer | {
        "value": found.value, "by_objective": found.by_objective, "parts": parts, "caution": scores["caution"][:, 0], "guardrail": scores["guardrail"][:, 0]
    }  # fmt: skip


def our_scores(policy: Policy, states: PlayerStates, candidates: np.ndarray) -> dict[str, np.ndarray]:
    """The same for candidates, under the names of score.onnx."""
    at = policy.situations(policy.encode(states))
    actions = candidates if policy.catalogue is None else policy.catalogue.embedding[candidates].astype(float)
    parts, scores = policy.parts(at, actions), policy.score(at, actions)
    weights = policy.platform.weights
    by_objective = parts.sum(-1)
    return {
        "value": by_objective @ weights, "by_objective": by_objective, "parts": parts * weights[:, None],
        "caution": scores["caution"], "guardrail": scores["guardrail"],
    }  # fmt: skip


def answers(path: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What onnxruntime makes of a graph, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {entry.name: given[entry.name] for entry in session.get_inputs()}), strict=True))


def compare(path: Path, given: dict[str, np.ndarray], expected: dict[str, np.ndarray], policy: Policy) -> float:
    """The largest difference, relative to max(1, |number|), of what onnxruntime answers; raises `BundleError` beyond `TOLERANCE`.

    Two candidates whose totals differ by less than float32 can tell may change places; then the totals, not the actions, have to agree.
    """
    found = answers(path, given)
    furthest = apart(found, expected, policy)
    if not furthest.max() <= TOLERANCE:  # NaN is no agreement either
        raise BundleError(
            f"{path.name}: onnxruntime answers otherwise than fastq ({int((~(furthest <= TOLERANCE)).sum())} of {len(furthest)} states); not exported"
        )
    return float(furthest.max())


def apart(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], policy: Policy) -> np.ndarray:
    """[B] the largest difference of each state's answers, relative to max(1, |number|); of tied ones that of what ranks them."""
    n = len(expected["value"])

    def distance(name: str) -> np.ndarray:
        difference = np.abs(found[name] - expected[name]) / np.maximum(1, np.abs(expected[name]))
        return difference.reshape(n, -1).max(1)

    numbers = [name for name in expected if name not in ("action", "ranking", "law")]
    differences = np.max([distance(name) for name in numbers], 0)
    if "action" in expected:
        same = distance("action")
    elif "ranking" in expected:
        same = np.where(found["ranking"][:, 0] == expected["ranking"][:, 0], 0.0, 1.0)
        differences = np.maximum(differences, np.abs(np.sort(found["law"], 1) - np.sort(expected["law"], 1)).max(1))
    else:
        return differences

    def total(answer: dict[str, np.ndarray]) -> np.ndarray:
        return answer["value"] - answer["caution"] - answer["guardrail"]

    tied = np.abs(total(found) - total(expected)) / np.maximum(1, np.abs(total(expected)))
    return np.where(same <= TOLERANCE, np.maximum(differences, same), tied)


def _plain(array: np.ndarray) -> Any:
    """Nested lists with None for NaN, as JSON has no other word for it."""
    if array.dtype.kind != "f":
        return array.tolist()
    return np.where(np.isfinite(array), array, np.array(None, object)).tolist()
