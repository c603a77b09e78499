"""From a player to an answer: the state out of the online store, what is known of its age, the decision and its explanation.

The same functions answer over HTTP (`serving.app`) and in the terminal (`recommend`, `explain`), so both say the same. Nothing is
invented: whatever keeps an answer from resting on a fresh, known state is said in its `degraded`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import numpy as np
import polars as pl

from fastq import features
from fastq.errors import BundleError, ConfigurationError, FastqError, RequestError, UnknownPlayerError
from fastq.features import PlayerStates
from fastq.platform import OWN_POLICY, CatalogueAction, Platform
from fastq.policy import CHUNKS, Policy, Recommendation, action_dicts
from serving.decision_log import Action, Decision, DecisionLog, Event, now_us, open_log

logger = logging.getLogger("fastq.serving")
BATCH = CHUNKS[0]  # rows per forward pass: always the same, so that a row's floats never depend on who else asked
COMMITTING_US = 60_000_000  # a decision made before a state was read may have been committed after; to lay one twice changes nothing
RETRY_SECONDS = 1.0  # how long an online store that failed is left alone
KEPT_POLICIES = 4  # older model versions held in memory for explanations


class NotReady(FastqError):
    """No model is loaded; nothing can be answered yet."""

    exit_code = 1


class StoreUnavailable(FastqError):
    """The online store cannot be read, and the question cannot be answered without it."""

    exit_code = 1


@dataclass(frozen=True)
class Model:
    """The policy that answers now, and its registered version; replaced whole, so a request never sees half of a change."""

    policy: Policy
    version: str


@dataclass(frozen=True)
class InlineState:
    """A state that came with the request, in raw units: `history` [window][measures], None where nothing is known; `actions` as in the logs."""

    player_id: str
    history: Sequence[Sequence[float | None]]
    attributes: Mapping[str, float | str | None]
    actions: Sequence[Any] | None = None
    objectives: Sequence[Sequence[float | None]] | None = None
    policy: str | None = None


@dataclass(frozen=True)
class Ask:
    """One request for recommendations: players whose state is read, or states that came along; and what narrows the answer."""

    players: tuple[str, ...] = ()
    states: tuple[InlineState, ...] = ()
    explore: bool = True
    exploration: float | None = None
    limits: Mapping[str, Mapping[str, float]] | None = None
    eligible: tuple[str, ...] | None = None
    top_k: int | None = None
    proposals: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.players) or len(self.states)

    @property
    def player_ids(self) -> list[str]:
        return list(self.players) or [s.player_id for s in self.states]

    @property
    def options(self) -> str:
        """Equal for requests that one call of the policy can answer."""
        return json.dumps([self.explore, self.exploration, self.limits, self.eligible, self.top_k], sort_keys=True)


@dataclass(frozen=True)
class Reading:
    """What the online store knew of B players: states, whether anything at all is known of each, a sentence where that is wanting."""

    states: PlayerStates
    known: list[bool]
    degraded: list[str | None]
    seen_at: list[datetime | None]
    reachable: bool = True


@dataclass
class Service:
    """What a process needs in order to answer. `model` alone changes while it runs."""

    platform: Platform
    log: DecisionLog
    model: Model | None = None
    excluded: frozenset[str] = frozenset()
    _store: Any = None
    _store_failed_at: float = -1e9
    _pushing: threading.Lock = field(default_factory=threading.Lock)
    _loading: threading.Lock = field(default_factory=threading.Lock)
    _older: dict[str, Policy] = field(default_factory=dict)

    def current(self) -> Model:
        """The model that answers now. Raises `NotReady`."""
        if self.model is None:
            raise NotReady("no model is loaded yet; train and promote one with `fastq retrain`")
        return self.model

    def policy_of(self, version: str) -> Policy:
        """The policy of a registered version, the one in service or an older one."""
        model = self.current()
        if version == model.version:
            return model.policy
        with self._loading:
            if version not in self._older:
                while len(self._older) >= KEPT_POLICIES:
                    self._older.pop(next(iter(self._older)))
                self._older[version] = load_model(self.platform, version).policy
            return self._older[version]

    def read(self, player_ids: Sequence[str]) -> pl.DataFrame:
        """The online store's rows of these players. Raises `StoreUnavailable`."""
        if time.monotonic() - self._store_failed_at < RETRY_SECONDS:
            raise StoreUnavailable("the online store could not be read a moment ago")
        from feature_repo import store

        try:
            if self._store is None:
                self._store = store.open_store(self.platform)
            frame: pl.DataFrame = store.read_online(self._store, list(player_ids))
        except Exception as error:
            self._store, self._store_failed_at = None, time.monotonic()
            logger.warning("the online store cannot be read: %s: %s", type(error).__name__, " ".join(str(error).split())[:300])
            raise StoreUnavailable("the online store cannot be read") from error
        return frame

    def write(self, frame: pl.DataFrame) -> None:
        """Bring rows into the online store. Raises `StoreUnavailable`."""
        from feature_repo import store

        try:
            if self._store is None:
                self._store = store.open_store(self.platform)
            store.push(self._store, frame)
        except Exception as error:
            self._store, self._store_failed_at = None, time.monotonic()
            logger.warning("the online store cannot be written: %s: %s", type(error).__name__, " ".join(str(error).split())[:300])
            raise StoreUnavailable("the online store cannot be written") from error


def load_model(platform: Platform, version: str | None = None) -> Model:
    """A registered model (default: the champion), checked against this platform's features.

    Raises `UnknownPlayerError`, `RequestError` or `BundleError` where there is none, or where it is not one that can be served here.
    """
    from fastq import registry

    found = version or registry.champion(platform)
    if found is None:
        raise BundleError(
            f"{platform.platform}: there is no champion to serve; run `fastq retrain`, or `fastq promote VERSION` for a version that `fastq models` lists"
        )
    try:
        policy = Policy.load(registry.fetch(platform, found))
    except (RuntimeError, KeyError, TypeError, ValueError) as error:  # whole, by its checksums, but not of a shape that this code reads
        raise BundleError(f"{platform.platform} version {found}: cannot be read by this release ({type(error).__name__}); run `fastq retrain`") from error
    if policy.fingerprint != features.fingerprint(platform):
        raise BundleError(f"{platform.platform} version {found}: made for other features than fastq.yaml describes now; run `fastq retrain`")
    # How a policy explores is the operator's to say today, whatever it was when the model was trained; what it is for stays as it was judged.
    served = policy.platform.model_copy(update={"serving": platform.serving, "root": platform.root})
    return Model(replace(policy, platform=served, version=found), found)


@contextlib.contextmanager
def open_service(platform: Platform) -> Iterator[Service]:
    """A service for one piece of work in this process: the champion, the online store, a file of the decision log."""
    model = load_model(platform)
    log = open_log(platform)
    try:
        yield Service(platform, log, model, excluded_players(platform))
    finally:
        log.close()


def excluded_players(platform: Platform) -> frozenset[str]:
    """Players who are never recommended anything: the column `player_id` of the file that `serving.exclude` names."""
    if platform.serving.exclude is None:
        return frozenset()
    path = platform.root / platform.serving.exclude
    try:
        frame = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path, infer_schema=False)
        return frozenset(frame["player_id"].cast(pl.String).drop_nulls())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ConfigurationError(f"{path}: serving.exclude: expected a file with a column player_id ({' '.join(str(error).split())[:200]})") from None


# ---- states ------------------------------------------------------------------------------------------------------------
def take(states: PlayerStates, rows: Sequence[int] | np.ndarray) -> PlayerStates:
    """Some players of a batch, in the order of `rows`."""
    index = np.asarray(rows, np.int64)
    attributes = None if states.attributes is None else features.attribute_rows(cast("pl.DataFrame", states.attributes), index)
    return PlayerStates(
        states.history[index],
        attributes,
        None if states.actions is None else states.actions[index],
        None if states.objectives is None else states.objectives[index],
        None if states.policies is None else [states.policies[i] for i in index],
    )


def joined(batches: Sequence[PlayerStates]) -> PlayerStates:
    """Several batches, each with all of its parts, as one."""
    if len(batches) == 1:
        return batches[0]
    return PlayerStates(
        np.concatenate([b.history for b in batches]),
        pl.concat([cast("pl.DataFrame", b.attributes) for b in batches]),
        np.concatenate([cast("np.ndarray", b.actions) for b in batches]),
        np.concatenate([cast("np.ndarray", b.objectives) for b in batches]),
        [name for b in batches for name in b.policies or []],
    )


def inline_states(model: Model, given: Sequence[InlineState]) -> PlayerStates:
    """States that came with a request. Raises `RequestError` that names the state and the shape that was expected."""
    platform, policy = model.policy.platform, model.policy
    window, measures, objectives = platform.state.window, list(platform.state.measures), list(platform.objectives)
    width = features.action_width(platform, policy.catalogue)
    history = np.full((len(given), window, len(measures)), np.nan, np.float32)
    actions = np.full((len(given), window, width), np.nan, np.float32)
    outcomes = np.full((len(given), window, len(objectives)), np.nan, np.float32)

    def table(where: str, rows: Sequence[Any], names: Sequence[str], what: str) -> np.ndarray:
        widths = {len(row) if isinstance(row, list | tuple) else 1 for row in rows}
        if len(rows) != window or (widths != {len(names)}):
            got = f"{len(rows)} of {' or '.join(map(str, sorted(widths))) or 'none'}"
            raise RequestError(f"{where}: expected {window} periods (the window), oldest first, of {len(names)} {what} ({', '.join(names)}), got {got}")
        return np.array([[np.nan if value is None else value for value in row] for row in rows], np.float32).reshape(window, len(names))

    for i, state in enumerate(given):
        where = f"states[{i}]"
        history[i] = table(f"{where}.history", state.history, measures, "measures")
        if state.objectives is not None:
            outcomes[i] = table(f"{where}.objectives", state.objectives, objectives, "objectives")
        if state.actions is not None and policy.catalogue is None:
            actions[i] = table(f"{where}.actions", state.actions, platform.dimension_names, "action dimensions")
        elif state.actions is not None and policy.catalogue is not None:
            if len(state.actions) != window or not all(a is None or isinstance(a, str) for a in state.actions):
                raise RequestError(f"{where}.actions: expected {window} item ids, oldest period first, null where nothing was done")
            positions = policy.catalogue.positions(list(state.actions))
            if unknown := [a for a, p in zip(state.actions, positions, strict=True) if a is not None and p < 0]:
                raise RequestError(f"{where}.actions: {unknown[0]!r} is not in the catalogue")
            actions[i] = np.where(positions[:, None] >= 0, policy.catalogue.embedding[positions], np.nan)
        if unknown := [name for name in state.attributes if name not in platform.state.attributes]:
            raise RequestError(f"{where}.attributes: {unknown[0]!r} is no attribute; expected {', '.join(platform.state.attributes) or 'none'}")
        for name, kind in platform.state.attributes.items():
            value = state.attributes.get(name)
            if kind.kind == "numeric" and (isinstance(value, str | bool)):
                raise RequestError(f"{where}.attributes.{name}: expected a number, got {value!r}")
        if state.policy is not None and state.policy not in (*platform.policies, OWN_POLICY):
            raise RequestError(f"{where}.policy: {state.policy!r} is no policy of this platform; expected {', '.join((*platform.policies, OWN_POLICY))}")
    columns = {
        name: pl.Series(name, [_attribute(s.attributes.get(name), a.kind) for s in given], dtype=pl.Float64 if a.kind == "numeric" else pl.String)
        for name, a in platform.state.attributes.items()
    }
    return PlayerStates(history, pl.DataFrame(columns) if columns else pl.DataFrame(height=len(given)), actions, outcomes, [s.policy for s in given])


def _attribute(value: float | str | None, kind: str) -> float | str | None:
    if value is None:
        return None
    return float(value) if kind == "numeric" else str(value)


def online_rows(service: Service, model: Model, player_ids: Sequence[str], at: datetime) -> tuple[pl.DataFrame, list[bool], list[datetime | None]]:
    """The online rows of distinct players with what was served and reported since; whether anything is known of each, and when it was seen last.

    Players of whom the store knows nothing get an empty row. Raises `StoreUnavailable`.
    """
    platform = service.platform
    schema = features.online_schema(platform)
    frame = service.read(player_ids).select(pl.col(name).cast(kind) for name, kind in schema.items())
    attributes = list(platform.state.attributes)
    known = {row[0]: (any(v is not None for v in row[1:]), row[1]) for row in frame.select("player_id", "seen_at", *attributes).iter_rows()}
    missing = [p for p in player_ids if p not in known]
    frame = pl.concat([frame, _empty_rows(service, model, missing, at)]) if missing else frame
    since = features.epoch_microseconds(at) - (platform.state.window + 1) * features.microseconds(platform)
    recent = service.log.recent(player_ids, since)
    if not recent.is_empty():
        # Older decisions are in the row already, with outcomes that may have come with the platform's own logs: only what is news is laid over it.
        written = frame.select("player_id", pl.col("event_timestamp").dt.epoch("us").alias("written"))
        recent = (
            recent.join(written, on="player_id", maintain_order="left")
            .filter(pl.col("said_at") >= pl.col("written").fill_null(0) - COMMITTING_US)
            .drop("said_at", "written")
        )
        frame = features.with_decisions(platform, frame, recent.sort("decided_at"), model.policy.catalogue)
    order = {p: i for i, p in enumerate(frame["player_id"].to_list())}
    frame = frame[[order[p] for p in player_ids]]
    return frame, [known.get(p, (False, None))[0] for p in player_ids], [known.get(p, (False, None))[1] for p in player_ids]


def _empty_rows(service: Service, model: Model, player_ids: Sequence[str], at: datetime) -> pl.DataFrame:
    platform = service.platform
    width = features.row_width(platform, model.policy.catalogue)
    period = features.epoch_microseconds(at) // features.microseconds(platform) - 1
    schema = features.online_schema(platform)
    return features.empty_frame(platform, pl.Series("player_id", list(player_ids), dtype=pl.String), width, period).select(
        pl.col(name).cast(kind) for name, kind in schema.items()
    )


def read_states(service: Service, model: Model, player_ids: Sequence[str], at: datetime) -> Reading:
    """The states of distinct players at `at`; an online store that cannot be read leaves them all unknown, and says so."""
    platform, n = service.platform, len(player_ids)
    try:
        frame, known, seen_at = online_rows(service, model, player_ids, at)
    except StoreUnavailable:
        blank = features.states_at(platform, _empty_rows(service, model, player_ids, at), at)
        return Reading(blank, [False] * n, ["the online store cannot be read, so nothing is known of this player now"] * n, [None] * n, reachable=False)
    degraded = [_wanting(platform, k, seen, at) for k, seen in zip(known, seen_at, strict=True)]
    return Reading(features.states_at(platform, frame, at), known, degraded, seen_at)


def _wanting(platform: Platform, known: bool, seen_at: datetime | None, at: datetime) -> str | None:
    """What an answer for this player lacks, as a sentence; None for a state that is known and fresh."""
    if not known:
        return "unknown player: nothing at all is known of them"
    if seen_at is None:
        return "cold start: only attributes are known of this player" if platform.state.measures else None
    age = at - seen_at
    if age > platform.serving.stale_after * platform.state.period:
        return f"stale state: nothing was seen of this player for {_spoken(age)}, since {rfc3339(features.epoch_microseconds(seen_at))}"
    return None


def _spoken(age: timedelta) -> str:
    seconds = age.total_seconds()
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def rfc3339(microseconds: int) -> str:
    """A moment in UTC, to the microsecond."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)).isoformat(timespec="microseconds").replace("+00:00", "Z")


# ---- decisions ---------------------------------------------------------------------------------------------------------
def decide(service: Service, asks: Sequence[Ask]) -> list[list[Decision] | FastqError]:
    """Answer several requests with one reading of the online store and as few forward passes as their options allow.

    One result per request, in order: its decisions, not logged yet, or why it cannot be answered.
    """
    model = service.current()
    at = datetime.now(UTC)
    players = list(dict.fromkeys(p for ask in asks for p in ask.players))
    reading = read_states(service, model, players, at) if players else None
    where = {p: i for i, p in enumerate(players)}
    results: dict[int, list[Decision] | FastqError] = {}
    groups: dict[str, list[tuple[int, PlayerStates]]] = {}
    for number, ask in enumerate(asks):
        try:
            states = inline_states(model, ask.states) if ask.states else take(cast("Reading", reading).states, [where[p] for p in ask.players])
        except FastqError as error:
            results[number] = error
        else:
            groups.setdefault(ask.options, []).append((number, states))
    for members in groups.values():
        states = joined([s for _, s in members])
        seeds = np.frombuffer(os.urandom(8 * len(states)), np.uint64)
        try:
            drawn = draw(model.policy, states, asks[members[0][0]], seeds)
        except FastqError as error:
            results.update((number, error) for number, _ in members)
            continue
        start = 0
        for number, own in members:
            rows = range(start, start + len(own))
            start += len(own)
            try:
                results[number] = [
                    _decision(
                        service,
                        model,
                        asks[number],
                        p,
                        at,
                        states,
                        drawn,
                        row,
                        (True, None) if reading is None or asks[number].states else (reading.known[where[p]], reading.degraded[where[p]]),
                    )
                    for p, row in zip(asks[number].player_ids, rows, strict=True)
                ]
            except FastqError as error:
                results[number] = error
    return [results[number] for number in range(len(asks))]


def draw(policy: Policy, states: PlayerStates, ask: Ask, seeds: np.ndarray) -> Recommendation:
    """The policy's recommendations, in batches of a fixed size: the same state, model and seed give the same floats, whoever else asked."""
    parts = [
        policy.recommend(
            take(states, np.arange(start, min(start + BATCH, len(states)))),
            ask.explore,
            seeds=seeds[start : start + BATCH],
            limits=ask.limits,
            exploration=ask.exploration,
            eligible=ask.eligible,
            top_k=ask.top_k or 1,
        )
        for start in range(0, len(states), BATCH)
    ]
    if len(parts) == 1:
        return parts[0]
    arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("action", "value", "by_objective", "propensity", "mean", "seeds")}
    ranking = None if parts[0].ranking is None else [ranked for p in parts for ranked in p.ranking or []]
    return Recommendation(**arrays, ranking=ranking)


def replay(service: Service, decision: Decision) -> Recommendation:
    """What the policy drew for a logged decision, drawn again: the same model, state, seed and place in the batch, so bit for bit the same on the same machine.

    The place matters because matrix products round differently in different rows. Raises `RequestError` for a decision that no model drew.
    """
    if decision.state is None or decision.model_version is None or "seed" not in decision.detail:
        raise RequestError(f"{decision.decision_id}: was not drawn by a model, so there is nothing to draw again")
    detail, slot = decision.detail, int(decision.detail["slot"])
    states = take(features.unpack_states(service.platform, [decision.state]), np.zeros(BATCH, np.int64))
    ask = Ask(
        explore=detail["explore"], exploration=detail["exploration"], limits=detail.get("limits"), eligible=detail.get("eligible"), top_k=detail.get("top_k")
    )
    drawn = draw(service.policy_of(decision.model_version), states, ask, np.full(BATCH, int(detail["seed"], 16), np.uint64))
    rows = {name: getattr(drawn, name)[slot : slot + 1] for name in ("action", "value", "by_objective", "propensity", "mean", "seeds")}
    return Recommendation(**rows, ranking=None if drawn.ranking is None else drawn.ranking[slot : slot + 1])


def _decision(
    service: Service,
    model: Model,
    ask: Ask,
    player_id: str,
    at: datetime,
    states: PlayerStates,
    drawn: Recommendation,
    row: int,
    standing: tuple[bool, str | None],
) -> Decision:
    """One player's decision out of a batch: the policy's, or the default action where the policy has nothing to go by."""
    platform, (known, degraded) = service.platform, standing
    holdout = platform.serving.holdout
    policy, assignment = OWN_POLICY, None
    version: str | None = model.version
    default: Action | None = None
    if player_id in service.excluded:
        default, degraded = (
            default_action(model.policy, ask),
            "this player is excluded from recommendations (serving.exclude); the platform's default action is served",
        )
    elif holdout.share > 0 and holdout.policy is not None:
        held = held_out(platform, player_id)
        assignment = holdout.share if held else 1 - holdout.share
        if held:
            default = proposal_of(platform, ask, holdout.policy, player_id)
            if default is not None:
                policy, version, degraded = holdout.policy, None, f"held out: this player stays with {holdout.policy}, whose proposal is served"
            else:
                default, degraded = (
                    default_action(model.policy, ask),
                    f"held out for {holdout.policy}, but the request brought no proposal of it; the platform's default action is served",
                )
    elif not known:
        default = default_action(model.policy, ask)
        instead = "no default action is allowed here, so an empty state was scored" if default is None else "the platform's default action is served"
        degraded = f"{degraded}; {instead}"
    detail: dict[str, Any] = {
        "explore": ask.explore,
        "degraded": degraded,
        "assignment": assignment,
        "limits": ask.limits,
        "eligible": ask.eligible,
        "top_k": ask.top_k,
    }
    if default is None:
        by_objective = dict(zip(platform.objectives, map(float, drawn.by_objective[row]), strict=True))
        propensity = float(drawn.propensity[row])
        action = action_dicts(platform, drawn.action[row : row + 1])[0]
        detail |= {
            "value": float(drawn.value[row]),
            "by_objective": by_objective,
            "mean": action_dicts(platform, drawn.mean[row : row + 1])[0],
            "seed": f"{int(drawn.seeds[row]):016x}",
            "slot": row % BATCH,
            "exploration": min(platform.serving.exploration, 1.0 if ask.exploration is None else ask.exploration),
        }
        if ask.top_k is not None and drawn.ranking is not None:
            detail["ranking"] = [str(item) for item in drawn.ranking[row]]
    else:
        propensity, action = float("nan"), default
        if ask.top_k is not None and drawn.ranking is not None:
            detail["ranking"] = [action["item_id"], *[str(i) for i in drawn.ranking[row] if i != action["item_id"]]][: ask.top_k]
    moment = features.epoch_microseconds(at)
    detail = {name: value for name, value in detail.items() if value is not None}
    return Decision(
        new_id(moment), player_id, moment, policy, propensity if np.isfinite(propensity) else None, version, action, detail, features.pack_state(states, row)
    )


def new_id(moment: int) -> str:
    """A decision id: a UUID version 7 (RFC 9562), so that ids sort by time and the log's index grows at its end."""
    value = (moment // 1000) << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62 | secrets.randbits(62)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def held_out(platform: Platform, player_id: str) -> bool:
    """Whether a player belongs to the holdout: a function of the platform's and the player's names alone, so it never changes."""
    digest = hashlib.sha256(f"{platform.platform}/holdout/{player_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < platform.serving.holdout.share


def default_action(policy: Policy, ask: Ask) -> Action | None:
    """The platform's default action, moved inside the request's limits; None if a catalogue names none that is eligible."""
    platform = policy.platform
    default = platform.default_action()
    if isinstance(platform.action, CatalogueAction):
        item = cast("str | None", default["item_id"])
        allowed = item is not None and (ask.eligible is None or item in ask.eligible)
        return cast("Action", {"item_id": item}) if allowed else None
    low, high = policy.edges(ask.limits)  # the bounds that its own answers keep
    values = np.array([[cast("float", default[name]) for name in platform.dimension_names]])
    return dict(zip(platform.dimension_names, map(float, policy.on_grid(np.clip(values, low, high), low, high)[0]), strict=True))


def proposal_of(platform: Platform, ask: Ask, policy: str, player_id: str) -> Action | None:
    """What a behaviour policy proposes for a player, as the request says: `{policy: action}`, or `{policy: {player: action}}`."""
    given = (ask.proposals or {}).get(policy)
    if given is None:
        return None
    if set(given) != set(platform.action_columns):
        given = given.get(player_id)
    return None if given is None else checked_action(platform, given, f"proposals.{policy}")


def checked_action(platform: Platform, given: Mapping[str, Any], where: str) -> Action:
    """An action that somebody wrote by hand, inside the platform's bounds. Raises `RequestError`."""
    if set(given) != set(platform.action_columns):
        raise RequestError(f"{where}: expected exactly {', '.join(platform.action_columns)}, got {', '.join(map(str, given)) or 'nothing'}")
    if not platform.dimension_names:
        if not isinstance(given["item_id"], str):
            raise RequestError(f"{where}.item_id: expected an item's id, got {given['item_id']!r}")
        return cast("Action", {"item_id": given["item_id"]})
    for name, (low, high) in zip(platform.dimension_names, platform.bounds, strict=True):
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise RequestError(f"{where}.{name}: expected a number between {low:g} and {high:g}, got {value!r}")
    return {name: float(given[name]) for name in platform.dimension_names}


def answer(platform: Platform, decision: Decision) -> dict[str, Any]:
    """A decision as `POST /v1/recommendations` says it."""
    detail = decision.detail
    said: dict[str, Any] = {
        "player_id": decision.player_id,
        "decision_id": decision.decision_id,
        "decided_at": rfc3339(decision.decided_at),
        "action": decision.action,
        "units": {name: d.unit for name, d in platform.action.dimensions.items()} if platform.action.kind == "continuous" else {},
        "propensity": decision.propensity,
        "value": detail.get("value"),
        "by_objective": detail.get("by_objective"),
        "policy": decision.policy,
        "model_version": decision.model_version,
        "degraded": detail.get("degraded"),
    }
    if "ranking" in detail:
        said["ranking"] = detail["ranking"]
    return said


def recommend(
    platform: Platform,
    players: Sequence[str],
    dry_run: bool = False,
    *,
    explore: bool = True,
    exploration: float | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
    eligible: Sequence[str] | None = None,
    top_k: int | None = None,
) -> dict[str, Any]:
    """Recommendations for players as the endpoint gives them, decided in this process and logged unless `dry_run`.

    Raises `BundleError` where there is no champion, `RequestError` for what cannot be answered, `LogUnavailable` where nothing could be stored.
    """
    if not players:
        raise RequestError("players: expected at least one player id")
    with open_service(platform) as service:
        decided = decide(
            service,
            [
                Ask(
                    players=tuple(map(str, players)),
                    explore=explore,
                    exploration=exploration,
                    limits=limits,
                    eligible=tuple(eligible) if eligible is not None else None,
                    top_k=top_k,
                )
            ],
        )[0]
        if isinstance(decided, FastqError):
            raise decided
        if not dry_run:
            service.log.append(decided).result()
        return {"recommendations": [answer(platform, d) for d in decided]}


# ---- activity -----------------------------------------------------------------------------------------------------------
def apply_activity(service: Service) -> int:
    """Bring events that were stored into the online store; returns how many. Raises `StoreUnavailable`, after which they wait for the next call."""
    platform, done = service.platform, 0
    if not service.log.unapplied(1):
        return 0
    from feature_repo import store

    with service._pushing, store.exclusive(platform):  # noqa: SLF001 - two at once would each read a row, add to it and lose the other's addition
        while waiting := service.log.unapplied():
            events = [event for _, event in waiting]
            at = datetime.now(UTC)
            players = list(dict.fromkeys(e.player_id for e in events))
            frame, _, _ = online_rows(service, service.current(), players, at)
            frame = features.with_events(platform, frame, event_frame(platform, events, service.log.path.name)).with_columns(
                event_timestamp=pl.lit(at).cast(pl.Datetime("us", "UTC"))
            )
            service.write(frame)
            service.log.applied([key for key, _ in waiting]).result()
            done += len(events)
    return done


def event_frame(platform: Platform, events: Sequence[Event], log: str) -> pl.DataFrame:
    """Events of a log as `features.with_events` takes them: what a row holds already does not count again."""
    columns: dict[str, Any] = {
        "player_id": pl.Series([e.player_id for e in events], dtype=pl.String),
        "occurred_at": pl.Series([e.occurred_at for e in events], dtype=pl.Int64),
    }
    columns |= {name: pl.Series([e.body.get(name) for e in events], dtype=pl.Float64) for name in platform.state.measures}
    columns |= {"log": pl.Series([log] * len(events), dtype=pl.String), "recorded_at": pl.Series([e.recorded_at for e in events], dtype=pl.Int64)}
    return pl.DataFrame(columns).with_columns(pl.from_epoch("occurred_at", time_unit="us").dt.replace_time_zone("UTC"))


# ---- explanations ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Question:
    """What an explanation is about: a past decision, or what would be recommended to a player now."""

    decision_id: str | None = None
    player_id: str | None = None
    against: str | Mapping[str, Any] | None = None
    weights: Mapping[str, float] | None = None


def explain_question(service: Service, question: Question) -> dict[str, Any]:
    """The answer of `POST /v1/explanations`: a past decision with the model and the state of then, or what would be recommended to a player now.

    Raises `UnknownPlayerError` for a decision that was never served or a player of whom nothing is known, `StoreUnavailable` where that cannot be told.
    """
    from fastq.explanation import as_dict, explain

    platform = service.platform
    if question.decision_id is not None:
        decision = service.log.find(question.decision_id)
        if decision is None:
            raise UnknownPlayerError(f"{question.decision_id}: no decision was served under this id")
        if decision.state is None or decision.model_version is None:
            raise RequestError(
                f"{question.decision_id}: no model decided this, or its state was not kept; ask by player_id to see what would be recommended now"
            )
        policy, states, action, player_id = (
            service.policy_of(decision.model_version),
            features.unpack_states(platform, [decision.state]),
            decision.action,
            decision.player_id,
        )
        executed = service.log.known([decision.decision_id])[decision.decision_id].executed
        logged: Action | None = executed if isinstance(executed, dict) else action
    else:
        assert question.player_id is not None
        player_id, policy = question.player_id, service.current().policy
        reading = read_states(service, service.current(), [player_id], datetime.now(UTC))
        must_know(reading, player_id)
        states = reading.states
        best = draw(policy, states, Ask(players=(player_id,), explore=False), np.zeros(1, np.uint64))
        action, logged = action_dicts(platform, best.action)[0], _last_action(service, states, policy, player_id)
    why = explain(
        policy, states, actions=as_array(policy, action), against=_against(service, policy, states, question.against, logged), weights=question.weights
    )
    return as_dict(why, 0, decision_id=question.decision_id, player_id=player_id, model_version=policy.version)


def must_know(reading: Reading, player_id: str) -> None:
    """Raises unless something is known of the only player of a reading."""
    if not reading.reachable:
        raise StoreUnavailable("the online store cannot be read, so nothing is known of this player now")
    if not reading.known[0]:
        raise UnknownPlayerError(f"{player_id}: nothing is known of this player")


def as_array(policy: Policy, action: Mapping[str, Any]) -> np.ndarray:
    """[1, D] an action in raw units, or [1] its item's id."""
    if policy.catalogue is not None:
        return np.array([str(action["item_id"])], object)
    return np.array([[float(action[name]) for name in policy.platform.dimension_names]])


def _last_action(service: Service, states: PlayerStates, policy: Policy, player_id: str) -> Action | None:
    """What was last done to a player, as far as the window reaches back."""
    recent = service.log.recent([player_id], now_us() - policy.platform.state.window * features.microseconds(policy.platform))
    if not recent.is_empty():
        return {name: recent[name][-1] for name in policy.platform.action_columns}
    if policy.catalogue is None and states.actions is not None:
        done = states.actions[0][~np.isnan(states.actions[0]).any(1)]
        if len(done):
            return dict(zip(policy.platform.dimension_names, map(float, done[-1]), strict=True))
    return None


def _against(service: Service, policy: Policy, states: PlayerStates, against: str | Mapping[str, Any] | None, logged: Action | None) -> Any:
    """What `fastq.explanation.explain` takes as the alternative."""
    platform = policy.platform
    if against is None or (isinstance(against, str) and against in policy.policies):
        return against
    if not isinstance(against, str):
        return checked_action(platform, against, "against")
    if against == "logged":
        if logged is None:
            raise RequestError("against: nothing is logged of this player inside the window; name a policy or an action")
        return ("logged", as_array(policy, logged))
    if against.startswith("model:"):
        return service.policy_of(against.removeprefix("model:"))
    raise RequestError(
        f"against: {against!r} is not known; expected {', '.join(policy.policies)}, logged, model:VERSION, "
        f"or an action with {', '.join(platform.action_columns)}"
    )


def explain(
    platform: Platform, player_or_decision: str, against: str | Mapping[str, Any] | None = None, weights: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The endpoint's explanation, made in this process: of a past decision if the id is one, else of what a player would be recommended now."""
    with open_service(platform) as service:
        served = service.log.find(player_or_decision) is not None
        question = Question(player_or_decision if served else None, None if served else player_or_decision, against, weights)
        return explain_question(service, question)
