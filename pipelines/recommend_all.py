"""Flow `recommend_all`: one recommendation for every player that is known, into a file, and into the decision log with the state it saw.

Players are taken in pieces, each a Parquet file as soon as it is decided, so a stopped batch goes on where it was when the same command is
given again. Pieces are decided in threads, in processes or on a Ray cluster. They become batches of the decision log by being renamed, and are
read together into the file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
from prefect import flow, task
from threadpoolctl import threadpool_limits

from fastq import features, registry
from fastq.assignment import challenged, excluded_players, held_out, pause_of, probability
from fastq.environment import last_as_long_as_the_parent, prepare
from fastq.errors import ConfigurationError, GateRefused, UnknownPlayerError, WorkspaceError
from fastq.features import OnlineStates
from fastq.platform import OWN_POLICY, Platform
from fastq.policy import CHUNKS, Policy, action_frame
from fastq.records import read_served, served_log
from fastq.sources import SINKS
from fastq.workspace import Workspace, check_target, replacing
from feature_repo import store
from feature_repo.definitions import STATE_FILE, feature_directory
from pipelines.distribute import connected
from pipelines.turn import EACH_TIME, Progress, platform_of, progress, running

PIECE = 5 * CHUNKS[-1]  # players: some seconds' work, some tens of megabytes
AT_ONCE = 2  # pieces that are decided at a time in threads
MANY = 10  # pieces, from which on processes of their own are worth what they import
MOST_PROCESSES = 16  # of half a gigabyte each
_LOGGED = ("state", "detail")  # columns that the decision log keeps and the file has no use for


@dataclass(frozen=True)
class Plan:
    """What a batch decides and when; a stopped one is taken up only if all of this is still so."""

    id: str
    at: str  # RFC 3339
    champion: str
    challenger: str | None
    serving: str  # what fastq.yaml said of serving and the features
    out: str
    dry_run: bool

    @property
    def moment(self) -> datetime:
        return datetime.fromisoformat(self.at)


# ---- the plan ----------------------------------------------------------------------------------------------------------
def planned(platform: Platform, out: str, dry_run: bool) -> tuple[Plan, Path]:
    """The plan of a stopped batch, if it may go on, else a new one; and its directory."""
    directory = Workspace(platform.root).batch
    champion = registry.champion(platform)
    if champion is None:
        raise UnknownPlayerError(f"{platform.platform}: there is no champion to recommend by; run `fastq retrain`")
    challenger = None if platform.serving.challenger.shadow else registry.challenger(platform, champion)  # one in shadow decides nothing
    said = hashlib.sha256((platform.serving.model_dump_json() + features.fingerprint(platform)).encode()).hexdigest()
    now = datetime.now(UTC)
    made = Plan(hashlib.sha256(f"{now.timestamp()}{out}".encode()).hexdigest()[:16], now.isoformat(), champion, challenger, said, out, dry_run)
    with_file = directory / "plan.json"
    try:
        before = Plan(**json.loads(with_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        before = None
    if before is not None and replace(before, id=made.id, at=made.at) == made and now - before.moment < platform.state.period:
        return before, directory
    shutil.rmtree(directory, ignore_errors=True)
    Workspace(platform.root).make(directory)
    with replacing(with_file) as partial:
        partial.write_text(json.dumps(asdict(made)), encoding="utf-8")
    return made, directory


def everybody(platform: Platform) -> list[str]:
    """Every player who may be recommended something, in a fixed order: known to the store or by events that came since."""
    path = feature_directory(platform) / STATE_FILE
    if not path.exists():
        raise WorkspaceError(f"{path}: no player states yet; run `fastq retrain`")
    known = pl.concat([pl.read_parquet(path, columns=["player_id"], glob=False), served_log(platform, "activity").select("player_id")])
    left_out = excluded_players(platform)
    players = [p for p in known["player_id"].unique().sort().to_list() if p not in left_out and not held_out(platform, p)]
    if not players:
        raise UnknownPlayerError("no player to recommend anything to: none is known, or serving.exclude and serving.holdout leave nobody")
    return players


# ---- deciding ------------------------------------------------------------------------------------------------------------
@dataclass
class States:
    """The online store, or what was materialised last where it cannot be read; and what was served since."""

    platform: Platform
    moment: datetime
    policy: Policy
    news: pl.DataFrame
    reachable: bool = True
    _store: Any = None
    _latest: pl.DataFrame | None = None

    def read(self, players: list[str]) -> OnlineStates:
        width = features.row_width(self.platform, self.policy.catalogue)
        rows = None
        if self.reachable:
            try:
                self._store = self._store or store.open_store(self.platform)
                rows = store.read_states(self._store, players, width)
            except WorkspaceError:
                self.reachable = False
        if rows is None:
            if self._latest is None:
                self._latest = store.materialized(self.platform)
            wanted = pl.DataFrame({"player_id": players}).join(self._latest, on="player_id", how="left", maintain_order="left")
            blank = features.empty_frame(self.platform, wanted.filter(pl.col("window").is_null())["player_id"], width).select(wanted.columns)
            frame = pl.concat([wanted.filter(pl.col("window").is_not_null()), blank.cast(wanted.schema)])
            rows = features.online_states(self.platform, pl.DataFrame({"player_id": players}).join(frame, on="player_id", how="left", maintain_order="left"))
        about = pl.DataFrame({"player_id": players}).with_row_index("at").join(self.news, on="player_id", maintain_order="right")
        if about.is_empty():
            return rows
        about = about.sort("decided_at", "decision_id")
        return features.lay_decisions(
            self.platform,
            rows,
            about["at"].to_numpy().astype(np.int64),
            about["decided_at"].dt.epoch("us").to_numpy(),
            about["policy"].to_list(),
            features.action_matrix(self.platform, about, self.policy.catalogue),
            about.select(pl.col(list(self.platform.objectives)).cast(pl.Float64)).to_numpy(),
        )


def served_since(platform: Platform, moment: datetime) -> pl.DataFrame:
    """Decisions that fastq served inside a window of `moment`, as they were executed, with what was reported."""
    undone = served_log(platform, "executed").sort("recorded_at").unique("decision_id", keep="last").filter(pl.col("action").is_null())["decision_id"]
    since = moment - (platform.state.window + 1) * platform.state.period
    return read_served(platform).filter((pl.col("decided_at") >= since) & ~pl.col("decision_id").is_in(undone.implode()))


def decided(platform: Platform, states: States, plan: Plan, policies: dict[str, Policy], players: list[str], first: int) -> pl.DataFrame:
    """One decision per player in the columns of `decisions`, with `value`, `state` and `detail` beside them; `first`: where the piece begins."""
    rows = states.read(players)
    kept = np.flatnonzero(rows.known)
    names = [players[i] for i in kept]
    whole = features.states_at(platform, rows, plan.moment)
    packed = features.pack_states(whole)
    by = [plan.challenger if plan.challenger is not None and challenged(platform, name) else plan.champion for name in names]
    parts = []
    for version in sorted(set(by)):
        policy, mine = policies[version], np.array([i for i, v in zip(kept, by, strict=True) if v == version], np.int64)
        seeds = np.random.default_rng([int(plan.id, 16), first, int.from_bytes(version.encode()[:8], "big")]).integers(0, 2**63, len(mine), dtype=np.uint64)
        found = policy.draw(policy.encode(whole)[mine], explore=True, seeds=seeds)
        share, objectives = platform.serving.exploration, list(platform.objectives)
        means = action_frame(platform, found.mean).rows(named=True)
        details = [  # what a replay and an explanation need, as the endpoint keeps it
            orjson.dumps(
                {
                    "explore": True, "value": v, "by_objective": dict(zip(objectives, o, strict=True)), "mean": m,
                    "seed": f"{s:016x}", "slot": slot, "exploration": share,
                }
            ).decode()
            for v, o, m, s, slot in zip(
                found.value.tolist(), found.by_objective.tolist(), means, found.seeds.tolist(), found.slots.tolist(), strict=True
            )
        ]  # fmt: skip
        parts.append(
            pl.DataFrame(
                {
                    "decision_id": [f"{plan.id}-{first + i:09d}" for i in mine.tolist()],
                    "player_id": [players[i] for i in mine.tolist()],
                    "decided_at": pl.Series([plan.moment] * len(mine), dtype=pl.Datetime("us", "UTC")),
                    "policy": [OWN_POLICY] * len(mine),
                    "propensity": pl.Series(np.asarray(found.propensity, float)).fill_nan(None),
                    "assignment": pl.Series(
                        [probability(platform, held=False, by_challenger=version == plan.challenger, challenger=plan.challenger is not None)] * len(mine),
                        dtype=pl.Float64,
                    ),
                    "model_version": [version] * len(mine),
                }
            )
            .hstack(action_frame(platform, found.action))
            .hstack(pl.DataFrame({name: pl.Series([None] * len(mine), dtype=pl.Float64) for name in objectives}))
            .with_columns(
                value=pl.Series(np.asarray(found.value, float)),
                seen_at=pl.Series(rows.seen_at[mine]),
                state=pl.Series([packed[i] for i in mine.tolist()], dtype=pl.Binary),
                detail=pl.Series(details, dtype=pl.String),
            )
        )
    return pl.concat(parts) if parts else pl.DataFrame()


@dataclass(frozen=True)
class Desk:
    """What a process needs in order to decide pieces of one batch."""

    platform: Platform
    plan: Plan
    policies: dict[str, Policy]
    states: States
    directory: Path

    def piece(self, first: int, players: list[str]) -> str | None:
        """Decide for some players, if that was not done before; their file, None where nobody is known."""
        path = self.directory / f"{self.plan.id}-{first:09d}.parquet"
        if not path.exists():
            found = decided(self.platform, self.states, self.plan, self.policies, players, first)
            if not found.is_empty():
                with replacing(path) as partial:
                    found.write_parquet(partial)
        return str(path) if path.exists() else None


def desk_of(workspace: str, plan: Plan, directory: str) -> Desk:
    """The policies of a plan, read once, and the states that they look at."""
    import torch

    platform = platform_of(workspace)
    torch.set_num_threads(1)  # pieces are the parallelism here
    policies = {}
    for version in filter(None, (plan.champion, plan.challenger)):
        policy = registry.load_policy(f"models:/{platform.platform}/{version}", platform.root)
        # how much to explore is the operator's to say today, whatever it was when the model was trained
        policies[version] = replace(policy, version=version, platform=policy.platform.model_copy(update={"serving": platform.serving, "root": platform.root}))
    return Desk(platform, plan, policies, States(platform, plan.moment, policies[plan.champion], served_since(platform, plan.moment)), Path(directory))


@functools.lru_cache(maxsize=1)
def _own_desk(workspace: str, plan: Plan, directory: str) -> Desk:
    """A worker's desk, made at its first piece."""
    prepare(Workspace(Path(workspace)))
    return desk_of(workspace, plan, directory)


def work_out(item: dict[str, Any]) -> dict[str, Any]:
    """One piece in another process, of this machine or of Ray's."""
    desk = _own_desk(item["workspace"], Plan(**item["plan"]), item["directory"])
    with threadpool_limits(1):
        return {"path": desk.piece(item["first"], item["players"]), "reachable": desk.states.reachable, "players": len(item["players"])}


@task(name="decide", **EACH_TIME)
def decide(workspace: str, plan: Plan, directory: str) -> tuple[list[str], bool]:
    """Decide for everybody, piece by piece; the files of the pieces in which somebody is known, and whether the online store gave the states.

    In threads of this process, where they are few: a process of its own imports for seconds before it decides. In processes, where they are many, since
    threads share one interpreter. On the cluster that `services.ray` names, if it names one. What is decided is the same, bit for bit.
    """
    platform, tell = platform_of(workspace), progress.get()
    players = everybody(platform)
    firsts, done, reachable = range(0, len(players), PIECE), 0, True
    about: dict[str, Any] = {"workspace": workspace, "plan": asdict(plan), "directory": directory}
    items = [{**about, "first": first, "players": players[first : first + PIECE]} for first in firsts]
    tell("recommending", 0, len(players), {})
    found: list[str | None] = []

    def told(result: dict[str, Any]) -> None:
        nonlocal done, reachable
        found.append(result["path"])
        reachable = reachable and result["reachable"]
        done += result["players"]
        tell("recommending", done, len(players), {})

    if platform.services.ray != "local":
        with connected(platform, "recommend"):
            import ray.data

            ray.data.DataContext.get_current().enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            for result in ray.data.from_items(items, override_num_blocks=len(items)).map(work_out).iter_rows():
                told(result)
    elif len(items) >= MANY and (os.cpu_count() or 1) > 1:
        with ProcessPoolExecutor(min(os.cpu_count() or 1, MOST_PROCESSES), get_context("spawn"), last_as_long_as_the_parent) as workers:
            try:
                for future in as_completed([workers.submit(work_out, item) for item in items]):
                    told(future.result())
            except BaseException:
                workers.shutdown(wait=False, cancel_futures=True)  # what is under way comes to its end, so that nothing is done twice
                raise
    else:
        desk = desk_of(workspace, plan, directory)
        # BLAS's own threads wait for each other longer than they multiply matrices as small as these
        with threadpool_limits(1), ThreadPoolExecutor(AT_ONCE) as pool:
            for item, path in zip(items, pool.map(lambda item: desk.piece(item["first"], item["players"]), items), strict=True):
                told({"path": path, "reachable": desk.states.reachable, "players": len(item["players"])})
    pieces = sorted(path for path in found if path is not None)
    if not pieces:
        raise GateRefused("recommend --all", [f"the online store knows none of {len(players):,} players; run `fastq retrain`, which fills it"])
    return pieces, reachable


@task(name="write", **EACH_TIME)
def write(workspace: str, plan: Plan, pieces: list[str]) -> tuple[int, int]:
    """First the log, then the file: a decision that nobody may carry out teaches nothing wrong, one that is carried out unlogged is lost.

    The number of decisions, and of those for players who were not seen for `serving.stale_after` periods, or ever.
    """
    platform = platform_of(workspace)
    space = Workspace(platform.root)
    oldest = features.epoch_microseconds(plan.moment - platform.serving.stale_after * platform.state.period)
    rows = pl.concat([pl.scan_parquet(path, glob=False) for path in pieces])
    total, stale = rows.select(pl.len(), (pl.col("seen_at") < oldest).sum().alias("stale")).collect().row(0)
    if not plan.dry_run:
        space.make(space.served)
        for path in pieces:
            with replacing(space.served / Path(path).name) as partial:
                pl.scan_parquet(path, glob=False).drop("value", "seen_at").sink_parquet(partial)
    out = Path(plan.out)
    with replacing(out) as partial:
        SINKS[out.suffix](rows.drop(*_LOGGED, "seen_at"), partial)
    return int(total), int(stale)


def _import(platform: Platform) -> None:
    """Do once what the flow will do, for what it imports: MLflow and Feast take seconds."""
    with contextlib.suppress(Exception):  # which the flow will say
        registry.champion(platform)
        store.open_store(platform)


@flow(name="recommend_all", persist_result=False, validate_parameters=False)
def recommend_all_flow(workspace: str, out: str, dry_run: bool) -> dict[str, Any]:
    platform = platform_of(workspace)
    plan, directory = planned(platform, out, dry_run)
    pieces, fresh = decide(workspace, plan, str(directory))
    total, stale = write(workspace, plan, pieces)
    shutil.rmtree(directory, ignore_errors=True)
    return {"players": total, "model_version": plan.champion, "degraded": stale if fresh else total, "logged": not dry_run}


def recommend_all(platform: Platform, out: str | Path, dry_run: bool = False, on_progress: Progress | None = None) -> dict[str, Any]:
    """Recommend for every player into `out` (.parquet, .csv or .ndjson), one row each: the columns of `decisions`, and `value`.

    Players of `serving.exclude` and of the holdout get no row, nor does one of whom nothing is known. With `dry_run` nothing is logged. A batch that
    was stopped goes on within a period, if the same is asked for and neither the champion nor fastq.yaml changed.
    Raises `GateRefused` while fastq is paused or where nobody is known, `ConfigurationError` where frequencies or budgets are capped, which are counted
    per request.
    """
    check_target("--out", Path(out), SINKS)
    if (pause := pause_of(Workspace(platform.root))) is not None:
        raise GateRefused("recommend --all", [f"{pause.sentence}; `fastq resume` ends it"])
    serving = platform.serving
    if serving.frequency is not None or serving.item_frequency is not None or serving.budgets:
        raise ConfigurationError("serving.frequency, item_frequency and budgets are counted by the endpoint, request by request; ask it, or leave them out")
    with Workspace(platform.root).lock("recommend_all"), running(platform, on_progress, lambda: _import(platform)):
        found: dict[str, Any] = recommend_all_flow(str(platform.root), str(Path(out).resolve()), dry_run)
        return {"out": str(out), **found}
