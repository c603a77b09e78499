"""Explanations of every player that is known, into one file: what `fastq explain --all` does. Stopped and started again, it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fastq.errors import RequestError, UnknownPlayerError
from fastq.explanation import HORIZONS, Against, Explanation, explain
from fastq.features import PlayerStates
from fastq.platform import Platform
from fastq.policy import CHUNKS, Policy, action_frame
from fastq.sources import SINKS
from fastq.workspace import check_target, replacing
from feature_repo import store
from serving import online

CHUNK = CHUNKS[-2]  # players at a time, and rows of a forward pass: with attributions some seconds' work
Progress = Callable[[int, int], None]


def explain_all(
    platform: Platform,
    out: Path,
    against: str | Mapping[str, Any] | None = None,
    *,
    attributions: bool = False,
    fresh: bool = False,
    on_progress: Progress = lambda done, of: None,
) -> dict[str, Any]:
    """Explain what would be recommended now to every known player into `out` (.parquet, .csv, .ndjson), one row each; as single explanations, to 1e-5.

    `against` is a behaviour policy, `model:VERSION` or an action. What is done already lies beside `out` until all is; a run that is repeated with the
    same model and question takes it up, with the moment at which it began, unless `fresh`. Raises `RequestError`, `ConfigurationError`, `StoreUnavailable`.
    """
    check_target("--out", out, SINKS)
    if against == "logged":
        raise RequestError("against: what was logged differs from player to player and is not known of all; expected a policy, model:VERSION or an action")
    players = store.known_players(platform)["player_id"].to_list()
    if not players:
        raise UnknownPlayerError("no player is known yet; run `fastq retrain`")
    with online.open_service(platform) as service:
        model = service.current()
        other = online.alternative(service, model.policy, against)
        asked = {
            "model_version": model.version,
            "against": against,
            "attributions": attributions,
            "chunk": CHUNK,  # another release may have another one, and pieces of its own
            "players": hashlib.sha256("\n".join(players).encode()).hexdigest(),
        }
        partial, at, resumed = _begin(out, asked, fresh=fresh)
        starts = range(0, len(players), CHUNK)
        taken = 0
        for start in starts:
            path = partial / f"{start:09d}.parquet"
            if path.exists():
                taken += 1
            else:
                chunk = players[start : start + CHUNK]
                reading = online.read_states(service, model, chunk, at)
                if not reading.reachable:
                    raise online.StoreUnavailable("the online store cannot be read; what is done already is kept, run this again")
                frame = rows(model.policy, reading.states, other, attributions=attributions)
                about = pl.DataFrame({"player_id": chunk, "model_version": [model.version] * len(chunk), "degraded": reading.degraded})
                with replacing(path) as writing:
                    about.cast({"degraded": pl.String}).hstack(frame).write_parquet(writing)
            on_progress(min(start + CHUNK, len(players)), len(players))
        whole = pl.concat([pl.scan_parquet(partial / f"{start:09d}.parquet", glob=False) for start in starts])
        with replacing(out) as writing:
            SINKS[out.suffix](whole if out.suffix == ".parquet" else _flat(whole), writing)
        shutil.rmtree(partial)
    return {
        "out": str(out),
        "players": len(players),
        "model_version": model.version,
        "at": at.isoformat().replace("+00:00", "Z"),
        "resumed": resumed and taken > 0,
    }


def _begin(out: Path, asked: Mapping[str, Any], *, fresh: bool) -> tuple[Path, datetime, bool]:
    """The directory of what is done already, the moment of which the states are, and whether it was there for the same question."""
    partial = out.with_name(f".{out.name}.partial")
    manifest = partial / "asked.json"
    if not fresh and manifest.exists():
        said = json.loads(manifest.read_text(encoding="utf-8"))
        at = datetime.fromisoformat(said.pop("at"))
        if said == asked:
            return partial, at, True
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    at = datetime.now(UTC)
    with replacing(manifest) as writing:
        writing.write_text(json.dumps({**asked, "at": at.isoformat()}), encoding="utf-8")
    return partial, at, False


def rows(policy: Policy, states: PlayerStates, against: Against | None = None, *, attributions: bool = False) -> pl.DataFrame:
    """One row per player of what `fastq.explanation.explain` says: action, value and its interval, parts, contrast, evidence, attributions if asked for."""
    why = explain(policy, states, against=against, attributions=attributions)
    objectives = list(policy.platform.objectives)
    columns: dict[str, Any] = {"value": why.value, "low": why.low, "high": why.high, "score": why.score["total"], **_parts("part", why.parts, objectives)}
    if (contrast := why.contrast) is not None:
        other = action_frame(policy.platform, contrast.action)
        columns |= {f"against_{name}": other[name] for name in other.columns}
        columns |= {"difference": contrast.difference, "difference_low": contrast.low, "difference_high": contrast.high}
        columns |= _parts("difference", contrast.parts, objectives)
        columns["decisive"] = [[f"{objective} {horizon}" for objective, horizon in reasons] for reasons in contrast.decisive]
    evidence = why.evidence
    columns |= {"disagreement": evidence.disagreement, "width": evidence.width, "policies": evidence.policies, "grade": evidence.grade}
    columns |= {"evidence": evidence.verdict}
    columns |= _moved(why)
    schema: dict[str, pl.DataType] = {name: pl.List(pl.String()) for name in ("decisive", "policies") if name in columns}
    return action_frame(policy.platform, why.action).hstack(pl.DataFrame(columns, schema_overrides=schema))


def _parts(prefix: str, parts: np.ndarray, objectives: Sequence[str]) -> dict[str, np.ndarray]:
    return {f"{prefix}_{name}_{horizon}": np.ascontiguousarray(parts[:, i, j]) for i, name in enumerate(objectives) for j, horizon in enumerate(HORIZONS)}


def _moved(why: Explanation) -> dict[str, np.ndarray]:
    if why.attributions is None:
        return {}
    return {f"moved_{name}": moved for name, moved in why.attributions.measures.items()} | {"completeness_gap": why.attributions.completeness_gap}


def _flat(frame: pl.LazyFrame) -> pl.LazyFrame:
    """Lists as text, for formats that have none."""
    return frame.with_columns(pl.col(name).list.join("; ") for name, kind in frame.collect_schema().items() if kind == pl.List(pl.String))
