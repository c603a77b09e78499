"""From a player to an answer: the state out of the online store, what is known of its age, the decision and its explanation.

The same functions answer over HTTP (`serving.app`) and in the terminal (`recommend`, `explain`), so both say the same. Nothing is
invented: whatever keeps an answer from resting on a fresh, known state is said in its `degraded`. States are arrays from the store to the
networks; a frame per request would cost more than the model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, cast

import numpy as np
import polars as pl

from fastq import features
from fastq.assignment import Pause, challenged, excluded_players, held_out, pause_of, probability
from fastq.errors import BundleError, FastqError, RequestError, UnknownPlayerError, WorkspaceError
from fastq.features import Columns, OnlineStates, PlayerStates
from fastq.forgetting import forgotten
from fastq.platform import OWN_POLICY, Cap, CatalogueAction, Platform
from fastq.policy import CHUNKS, Encoded, Policy, Recommendation, action_dicts
from fastq.records import BOUND_TOLERANCE
from fastq.workspace import Workspace
from serving.decision_log import Action, Decision, DecisionLog, Event, now_us, open_log

logger = logging.getLogger("fastq.serving")
COMMITTING_US = 60_000_000  # a decision made before a state was read may have been committed after; to lay one twice changes nothing
RETRY_SECONDS = 1.0  # how long an online store that failed is left alone
PAUSE_SECONDS = 0.25  # how old the last look for a pause may be
LONGEST_ID = 500  # characters of a player's id
WARM_ROWS = 64  # largest batch that is drawn once before the first request
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

    @functools.cached_property
    def options(self) -> str:
        """Equal for requests that one call of the policy can answer."""
        if self.limits is None and self.eligible is None and self.top_k is None and self.exploration is None:
            return "" if self.explore else "best"
        return json.dumps([self.explore, self.exploration, self.limits, self.eligible, self.top_k], sort_keys=True)


@dataclass(frozen=True)
class Reading:
    """What the online store knew of B players: states, whether anything at all is known of each, a sentence where that is wanting, and
    when each was seen last (us, `features.NEVER`).
    """

    states: PlayerStates
    known: list[bool]
    degraded: list[str | None]
    seen_at: list[int]
    reachable: bool = True


@dataclass
class Service:
    """What a process needs in order to answer. `model`, `challenger` and `excluded` change while it runs, each whole."""

    platform: Platform
    log: DecisionLog
    model: Model | None = None
    excluded: frozenset[str] = frozenset()
    challenger: Model | None = None
    timed: Callable[[str, float], None] = field(default=lambda _stage, _seconds: None)  # told how long each stage of a batch took
    _store: Any = None
    _store_failed_at: float = -1e9
    _pause: Pause | None = None
    _pause_read_at: float = -1e9
    _pushing: threading.Lock = field(default_factory=threading.Lock)
    _loading: threading.Lock = field(default_factory=threading.Lock)
    _older: dict[str, Policy] = field(default_factory=dict)

    def current(self) -> Model:
        """The model that answers now. Raises `NotReady`."""
        if self.model is None:
            raise NotReady("no model is loaded yet; train and promote one with `fastq retrain`")
        return self.model

    @property
    def pause(self) -> Pause | None:
        """The pause that is on, looked for again when the last look is older than `PAUSE_SECONDS`."""
        if time.monotonic() - self._pause_read_at > PAUSE_SECONDS:
            try:
                self._pause = pause_of(Workspace(self.platform.root))
            except WorkspaceError as error:  # somebody meant to pause: the safe reading
                logger.error("%s", error)
                self._pause = self._pause or Pause(self.platform.serving.holdout.policy, "an unreadable moment", "?", "")
            self._pause_read_at = time.monotonic()
        return self._pause

    def policy_of(self, version: str) -> Policy:
        """The policy of a registered version, or of the one that an alias names now: the one in service or another."""
        if not version.isdecimal():
            from fastq import registry

            version = registry.resolve(self.platform, version)
        for model in (self.current(), self.challenger):
            if model is not None and version == model.version:
                return model.policy
        with self._loading:
            if version not in self._older:
                while len(self._older) >= KEPT_POLICIES:
                    self._older.pop(next(iter(self._older)))
                self._older[version] = load_model(self.platform, version).policy
            return self._older[version]

    def read(self, player_ids: Sequence[str], width: int) -> OnlineStates:
        """What the online store keeps of these players, in their order; `width`: numbers in a row. Raises `StoreUnavailable`."""
        if time.monotonic() - self._store_failed_at < RETRY_SECONDS:
            raise StoreUnavailable("the online store could not be read a moment ago")
        from feature_repo import store

        try:
            if self._store is None:
                self._store = store.open_store(self.platform)
            return store.read_states(self._store, player_ids, width)
        except Exception as error:
            self._store, self._store_failed_at = None, time.monotonic()
            logger.warning("the online store cannot be read: %s: %s", type(error).__name__, " ".join(str(error).split())[:300])
            raise StoreUnavailable("the online store cannot be read") from error

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


def load_challenger(platform: Platform, champion: str) -> Model | None:
    """The model of `registry.challenger`, None where there is none. Raises as `load_model`."""
    from fastq import registry

    version = registry.challenger(platform, champion)
    return None if version is None else load_model(platform, version)


@contextlib.contextmanager
def open_service(platform: Platform) -> Iterator[Service]:
    """A service for one piece of work in this process: the champion, the online store, a file of the decision log."""
    model = load_model(platform)
    log = open_log(platform)
    try:
        yield Service(platform, log, model, excluded_players(platform), load_challenger(platform, model.version))
    finally:
        log.close()


# ---- states ------------------------------------------------------------------------------------------------------------
def joined(batches: Sequence[PlayerStates]) -> PlayerStates:
    """Several batches, each with all of its parts and attributes as columns, as one."""
    if len(batches) == 1:
        return batches[0]
    columns: dict[str, np.ndarray | list[str | None]] = {}
    for name in cast("Columns", batches[0].attributes):
        parts = [cast("Columns", b.attributes)[name] for b in batches]
        numeric = isinstance(parts[0], np.ndarray)
        columns[name] = np.concatenate(cast("list[np.ndarray]", parts)) if numeric else [value for part in parts for value in part]
    return PlayerStates(
        np.concatenate([b.history for b in batches]),
        columns,
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
        return np.array([[np.nan if value is None else value for value in row] for row in rows], float).reshape(window, len(names))

    def bounded(where: str, values: np.ndarray, names: Sequence[str], bounds: np.ndarray, slack: np.ndarray) -> np.ndarray:
        """Values that the logs' own rules would let pass: what is quarantined there is refused here."""
        outside = (values < bounds[:, 0] - slack) | (values > bounds[:, 1] + slack)  # of NaN neither is true
        if outside.any():
            t, j = map(int, np.argwhere(outside)[0])
            low, high = bounds[j]
            expected = " and ".join([f"at least {low:g}"] * math.isfinite(low) + [f"at most {high:g}"] * math.isfinite(high))
            raise RequestError(f"{where}[{t}]: {names[j]}: expected {expected} in a period, null where nothing is known, got {values[t, j]:g}")
        return values

    within = np.array([measure.of_a_period for measure in platform.state.measures.values()]).reshape(len(measures), 2)
    rounding = BOUND_TOLERANCE * np.maximum(1, np.abs(np.where(np.isfinite(within), within, 0)).max(1, initial=0))
    for i, state in enumerate(given):
        where = f"states[{i}]"
        history[i] = bounded(f"{where}.history", table(f"{where}.history", state.history, measures, "measures"), measures, within, rounding)
        if state.objectives is not None:
            outcomes[i] = table(f"{where}.objectives", state.objectives, objectives, "objectives")
        if state.actions is not None and policy.catalogue is None:
            done, bounds = table(f"{where}.actions", state.actions, platform.dimension_names, "action dimensions"), platform.bounds
            actions[i] = bounded(f"{where}.actions", done, platform.dimension_names, bounds, BOUND_TOLERANCE * (bounds[:, 1] - bounds[:, 0]))
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
    columns: dict[str, np.ndarray | list[str | None]] = {}
    for name, kind in platform.state.attributes.items():
        values = [state.attributes.get(name) for state in given]
        columns[name] = np.array(values, float) if kind.kind == "numeric" else [None if value is None else str(value) for value in values]
    return PlayerStates(history, columns, actions, outcomes, [s.policy for s in given])


def row_width(model: Model) -> int:
    """Numbers in a player-period row as the model reads it."""
    return features.row_width(model.policy.platform, model.policy.catalogue)


def online_rows(service: Service, model: Model, player_ids: Sequence[str], moment: int) -> tuple[OnlineStates, list[bool]]:
    """The online rows of distinct players at `moment` (us), what was served and reported since laid over; and whether anything is known of each.

    Players of whom the store knows nothing have an empty row. Raises `StoreUnavailable`.
    """
    platform = service.platform
    rows = service.read(player_ids, row_width(model))
    known = rows.known.tolist()
    recent = service.log.recent(player_ids, moment - (platform.state.window + 1) * features.microseconds(platform))
    if recent:
        where = {player: i for i, player in enumerate(player_ids)}
        # Older decisions are in the row already, with outcomes that may have come with the platform's own logs: only what is news is laid over it.
        news = [r for r in recent if r.said_at >= rows.read_at[where[r.player_id]] - COMMITTING_US]
        rows = features.lay_decisions(
            platform,
            rows,
            np.array([where[r.player_id] for r in news], np.int64),
            np.array([r.decided_at for r in news], np.int64),
            [r.policy for r in news],
            _action_matrix(model.policy, [r.action for r in news]),
            np.array([[r.values.get(name, np.nan) for name in platform.objectives] for r in news], float).reshape(len(news), len(platform.objectives)),
        )
    return rows, known


def _action_matrix(policy: Policy, actions: Sequence[Action]) -> np.ndarray:
    """[N, D] raw units, or item embeddings with NaN for an item that the catalogue does not hold."""
    if policy.catalogue is None:
        names = policy.platform.dimension_names
        return np.array([[action[name] for name in names] for action in actions], float).reshape(len(actions), len(names))
    positions = policy.catalogue.positions([cast("str | None", action["item_id"]) for action in actions])
    return np.where(positions[:, None] >= 0, policy.catalogue.embedding[positions], np.nan).astype(float)


def read_states(service: Service, model: Model, player_ids: Sequence[str], at: datetime) -> Reading:
    """The states of distinct players at `at`; an online store that cannot be read leaves them all unknown, and says so."""
    platform, n, moment = service.platform, len(player_ids), features.epoch_microseconds(at)
    try:
        rows, known = online_rows(service, model, player_ids, moment)
    except StoreUnavailable:
        blank = features.empty_states(platform, player_ids, row_width(model))
        sentence = "the online store cannot be read, so nothing is known of this player now"
        return Reading(features.states_at(platform, blank, at), [False] * n, [sentence] * n, [features.NEVER] * n, reachable=False)
    seen_at = rows.seen_at.tolist()
    return Reading(features.states_at(platform, rows, at), known, [_wanting(platform, k, s, moment) for k, s in zip(known, seen_at, strict=True)], seen_at)


def _wanting(platform: Platform, known: bool, seen_at: int, moment: int) -> str | None:
    """What an answer for this player lacks, as a sentence; None for a state that is known and fresh."""
    if not known:
        return "unknown player: nothing at all is known of them"
    if seen_at == features.NEVER:
        return "cold start: only attributes are known of this player" if platform.state.measures else None
    if moment - seen_at > platform.serving.stale_after * features.microseconds(platform):
        return f"stale state: nothing was seen of this player for {_spoken(timedelta(microseconds=moment - seen_at))}, since {rfc3339(seen_at)}"
    return None


def _spoken(age: timedelta) -> str:
    seconds = age.total_seconds()
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


@functools.lru_cache(maxsize=64)  # a batch's decisions have one moment
def rfc3339(microseconds: int) -> str:
    """A moment in UTC, to the microsecond."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)).isoformat(timespec="microseconds").replace("+00:00", "Z")


def warm(service: Service) -> None:
    """Do once what the first requests would else wait for: a draw in each size of batch that the endpoint computes, and the store's file in memory."""
    model = service.current()
    for size in (size for size in CHUNKS if size <= WARM_ROWS):
        blank = features.empty_states(service.platform, ["x"] * size, row_width(model))
        states = features.states_at(service.platform, blank, datetime.now(UTC))
        draw(model.policy, model.policy.encode(states), Ask(), np.zeros(size, np.uint64))
        features.pack_states(states)
    with contextlib.suppress(StoreUnavailable):
        service.read(["x"], row_width(model))
    file = Workspace(service.platform.root).feast / "online.db"
    if service.platform.services.online_store == "sqlite" and file.exists() and hasattr(os, "posix_fadvise"):
        with file.open("rb") as pages:
            os.posix_fadvise(pages.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)  # a page that is not in memory holds up a whole batch


# ---- decisions ---------------------------------------------------------------------------------------------------------
class Drawn(NamedTuple):
    """What the policy drew for one player, as plain numbers; see `Recommendation`."""

    action: Action
    value: float
    by_objective: list[float]
    propensity: float
    mean: Action
    seed: int
    slot: list[int]
    ranking: list[str] | None


def drawn_rows(platform: Platform, found: Recommendation) -> list[Drawn]:
    """A recommendation row by row: arrays are taken apart once a batch, not once a number."""
    columns = (found.value, found.by_objective, found.propensity)
    ranking: Sequence[list[str] | None] = [None] * len(found) if found.ranking is None else [[str(item) for item in ranked] for ranked in found.ranking]
    rows = zip(
        action_dicts(platform, found.action), *(c.tolist() for c in columns), action_dicts(platform, found.mean), found.seeds.tolist(), found.slots.tolist(),
        ranking, strict=True,
    )  # fmt: skip
    return [Drawn(*row) for row in rows]


@dataclass
class Row:
    """One player of one request on the way to a decision. `by` draws unless there is a `default`; `ask` may be narrowed by what is left of a budget."""

    number: int  # of the request
    ask: Ask
    player_id: str
    state: int  # position in the batch of states
    by: Model
    policy: str = OWN_POLICY
    default: Action | None = None
    degraded: str | None = None
    assignment: float | None = None
    drawn: Drawn | None = None
    shadow: dict[str, Any] | None = None


def decide(service: Service, asks: Sequence[Ask]) -> list[list[Decision] | FastqError]:
    """Answer several requests with one reading of the online store and as few forward passes as their options allow.

    One result per request, in order: its decisions, not logged yet, or why it cannot be answered.
    """
    model, at = service.current(), datetime.now(UTC)
    if (pause := service.pause) is not None:
        return [_paused(service, model, pause, ask, features.epoch_microseconds(at)) for ask in asks]
    failed: dict[int, FastqError] = {}
    players = list(dict.fromkeys(p for ask in asks for p in ask.players))
    started = time.perf_counter()
    reading = read_states(service, model, players, at) if players else None
    service.timed("read", time.perf_counter() - started)
    where = {player: i for i, player in enumerate(players)}
    batches = [reading.states] if reading is not None else []
    spent = _spent(service, [p for ask in asks for p in ask.player_ids], features.epoch_microseconds(at))
    rows: list[Row] = []
    count = len(players)
    for number, ask in enumerate(asks):
        try:
            check(model.policy, ask)
            if capped(service.platform) and (twice := [p for p, times in Counter(ask.player_ids).items() if times > 1]):
                raise RequestError(f"{twice[0]}: expected each player once in a request, since what they may have is capped (serving.frequency, budgets)")
            if ask.states:
                batches.append(inline_states(model, ask.states))
                own = [_row(service, model, number, ask, s.player_id, count + i, True, None, spent) for i, s in enumerate(ask.states)]
                count += len(ask.states)
            else:
                assert reading is not None
                own = [_row(service, model, number, ask, p, i, reading.known[i], reading.degraded[i], spent) for p in ask.players for i in (where[p],)]
        except FastqError as error:
            failed[number] = error
        else:
            rows += own
    packed: list[bytes] = []
    if rows:
        states, started = joined(batches), time.perf_counter()
        failed |= _draw_rows(service, states, rows)
        service.timed("draw", time.perf_counter() - started)
        packed = features.pack_states(states)
    results: list[list[Decision] | FastqError] = [failed.get(number, []) for number in range(len(asks))]
    moment = features.epoch_microseconds(at)
    for row in rows:
        result = results[row.number]
        if isinstance(result, list):
            result.append(_decision(service.platform, row, moment, packed[row.state]))
    return results


def _paused(service: Service, model: Model, pause: Pause, ask: Ask, moment: int) -> list[Decision] | FastqError:
    """A request's decisions while fastq is paused: the policy's proposals, or the default action."""
    try:
        check(model.policy, ask)
        found = []
        for player_id in ask.player_ids:
            proposal = None if pause.policy is None else proposal_of(service.platform, ask, pause.policy, player_id)
            action = proposal or default_action(model.policy, ask) or _any_item(model.policy, ask)
            served = f"the proposal of {pause.policy}" if proposal is not None else "the platform's default action"
            detail = {"explore": ask.explore, "degraded": f"paused: fastq decides for nobody since {pause.since}; {served} is served"}
            if ask.top_k is not None and "item_id" in action:
                detail["ranking"] = [action["item_id"]]
            by = (pause.policy or OWN_POLICY, None) if proposal is not None else (OWN_POLICY, model.version)
            found.append(Decision(new_id(moment), player_id, moment, by[0], None, by[1], action, detail))
    except FastqError as error:
        return error
    return found


def _any_item(policy: Policy, ask: Ask) -> Action:
    """The first item that may be shown, where a catalogue names no default that is eligible."""
    assert policy.catalogue is not None
    return cast("Action", {"item_id": ask.eligible[0] if ask.eligible else policy.catalogue.ids[0]})


def _row(
    service: Service, model: Model, number: int, ask: Ask, player_id: str, state: int, known: bool, degraded: str | None, spent: Mapping[str, Spent]
) -> Row:
    """Who decides for one player: the champion or the challenger, or nobody, and then what is served instead and why."""
    platform, row = service.platform, Row(number, ask, player_id, state, model, degraded=degraded)
    holdout = platform.serving.holdout
    if player_id in service.excluded:
        row.default = default_action(model.policy, ask)
        row.degraded = "this player is excluded from recommendations (serving.exclude); the platform's default action is served"
        return row
    held = held_out(platform, player_id)
    rival = service.challenger if not platform.serving.challenger.shadow else None
    by_rival = rival is not None and challenged(platform, player_id)
    row.assignment = probability(platform, held=held, by_challenger=by_rival, challenger=rival is not None)
    if held:
        assert holdout.policy is not None
        row.default = proposal_of(platform, ask, holdout.policy, player_id)
        if row.default is not None:
            row.policy, row.degraded = holdout.policy, f"held out: this player stays with {holdout.policy}, whose proposal is served"
        else:
            row.default = default_action(model.policy, ask)
            row.degraded = f"held out for {holdout.policy}, but the request brought no proposal of it; the platform's default action is served"
        return row
    if by_rival and rival is not None:
        row.by = rival
    if not known:
        row.default = default_action(model.policy, ask)
        instead = "no default action is allowed here, so an empty state was scored" if row.default is None else "the platform's default action is served"
        row.degraded = f"{degraded}; {instead}"
    if player_id in spent:
        _narrow(platform, row, spent[player_id])
    return row


def _draw_rows(service: Service, states: PlayerStates, rows: Sequence[Row]) -> dict[int, FastqError]:
    """Draw for every row that a model decides; the requests that cannot be answered, with why."""
    failed: dict[int, FastqError] = {}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.default is None or row.ask.top_k is not None:  # a ranking goes on below the default item
            groups.setdefault((row.by.version, row.ask.options), []).append(row)
    encoded: dict[str, Encoded] = {}
    for members in groups.values():
        by, ask = members[0].by, members[0].ask
        if by.version not in encoded:
            encoded[by.version] = by.policy.encode(states)
        seeds = np.frombuffer(os.urandom(8 * len(members)), np.uint64)
        try:
            drawn = draw(by.policy, _some(encoded[by.version], members), ask, seeds)
        except FastqError as error:
            failed.update((row.number, error) for row in members)
            continue
        for row, own in zip(members, drawn_rows(by.policy.platform, drawn), strict=True):
            row.drawn = own
        if service.platform.serving.challenger.shadow and service.challenger is not None:
            _shadow(service.challenger, states, encoded, members, ask, seeds)
    return failed


def _some(encoded: Encoded, members: Sequence[Row]) -> Encoded:
    index = [row.state for row in members]
    return encoded if index == list(range(len(encoded))) else encoded[np.array(index)]


def _shadow(rival: Model, states: PlayerStates, encoded: dict[str, Encoded], members: Sequence[Row], ask: Ask, seeds: np.ndarray) -> None:
    """What the challenger would have done, beside what is served; its failures are its own."""
    try:
        if rival.version not in encoded:
            encoded[rival.version] = rival.policy.encode(states)
        drawn = draw(rival.policy, _some(encoded[rival.version], members), ask, seeds)
    except (FastqError, RuntimeError, ValueError) as error:
        logger.warning("the challenger, version %s, cannot answer in shadow: %s", rival.version, error)
        return
    actions, values, propensities = action_dicts(rival.policy.platform, drawn.action), drawn.value.tolist(), drawn.propensity.tolist()
    for row, action, value, propensity in zip(members, actions, values, propensities, strict=True):
        row.shadow = {"model_version": rival.version, "action": action, "value": value, "propensity": _or_none(propensity)}


def draw(policy: Policy, encoded: Encoded, ask: Ask, seeds: np.ndarray) -> Recommendation:
    """The policy's recommendations under a request's options."""
    return policy.draw(encoded, ask.explore, seeds, limits=ask.limits, exploration=ask.exploration, eligible=ask.eligible, top_k=ask.top_k or 1)


def replay(service: Service, decision: Decision) -> Recommendation:
    """What the policy drew for a logged decision, drawn again: the same model, state, seed and place in a batch of the same size, so bit for bit
    the same on the same machine.

    Size and place matter because matrix products round differently with them. Raises `RequestError` for a decision that no model drew.
    """
    if decision.state is None or decision.model_version is None or "seed" not in decision.detail:
        raise RequestError(f"{decision.decision_id}: was not drawn by a model, so there is nothing to draw again")
    detail = decision.detail
    policy, (size, place) = service.policy_of(decision.model_version), detail["slot"]
    return policy.draw_again(
        policy.encode(features.unpack_states(service.platform, [decision.state])),
        int(detail["seed"], 16),
        (size, place),
        detail["explore"],
        limits=detail.get("limits"),
        exploration=detail["exploration"],
        eligible=detail.get("eligible"),
        top_k=detail.get("top_k") or 1,
    )


def _decision(platform: Platform, row: Row, moment: int, state: bytes) -> Decision:
    """A row's decision: the policy's draw, or the default."""
    ask, drawn = row.ask, row.drawn
    said = (("degraded", row.degraded), ("limits", ask.limits), ("eligible", ask.eligible), ("top_k", ask.top_k), ("shadow", row.shadow))
    detail: dict[str, Any] = {"explore": ask.explore, **{name: value for name, value in said if value is not None}}
    if drawn is not None and ask.top_k is not None and drawn.ranking is not None:
        ranking = drawn.ranking
        if row.default is not None:
            first = row.default["item_id"]
            ranking = [str(first), *[item for item in ranking if item != first]][: ask.top_k]
        detail["ranking"] = ranking
    if row.default is not None:
        version = row.by.version if row.policy == OWN_POLICY else None
        return Decision(new_id(moment), row.player_id, moment, row.policy, None, version, row.default, detail, state, row.assignment)
    assert drawn is not None
    detail["value"] = drawn.value
    detail["by_objective"] = dict(zip(platform.objectives, drawn.by_objective, strict=True))
    detail["mean"] = drawn.mean
    detail["seed"] = f"{drawn.seed:016x}"
    detail["slot"] = drawn.slot
    most = platform.serving.exploration
    detail["exploration"] = most if ask.exploration is None else min(most, ask.exploration)
    return Decision(new_id(moment), row.player_id, moment, row.policy, _or_none(drawn.propensity), row.by.version, drawn.action, detail, state, row.assignment)


def _or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None


def new_id(moment: int) -> str:
    """A decision id: a UUID version 7 (RFC 9562), so that ids sort by time and the log's index grows at its end."""
    noise = os.urandom(10).hex()
    text = f"{moment // 1000:012x}"
    return f"{text[:8]}-{text[8:]}-7{noise[:3]}-{'89ab'[int(noise[3], 16) & 3]}{noise[4:7]}-{noise[7:19]}"


# ---- caps and budgets ----------------------------------------------------------------------------------------------------
@dataclass
class Spent:
    """What a player has had of fastq's decisions within each cap's time."""

    decisions: int = 0
    items: Counter[str] = field(default_factory=Counter)
    sums: dict[str, float] = field(default_factory=dict)


def capped(platform: Platform) -> bool:
    """Whether what a player had before decides what they may have now."""
    serving = platform.serving
    return serving.frequency is not None or serving.item_frequency is not None or bool(serving.budgets)


def _spent(service: Service, player_ids: Sequence[str], moment: int) -> dict[str, Spent]:
    platform, serving = service.platform, service.platform.serving
    if not capped(platform):
        return {}
    caps: dict[str, Cap] = {**serving.budgets} | {f"?{n}": c for n, c in (("decisions", serving.frequency), ("items", serving.item_frequency)) if c is not None}
    since = {name: moment - round((cap.per or platform.state.period).total_seconds() * 1e6) for name, cap in caps.items()}
    found: dict[str, Spent] = {p: Spent() for p in player_ids}
    for past in service.log.recent(player_ids, min(since.values())):
        if past.policy != OWN_POLICY:
            continue
        had = found[past.player_id]
        had.decisions += past.drawn and past.decided_at >= since.get("?decisions", moment)
        if past.decided_at >= since.get("?items", moment):
            had.items[str(past.action.get("item_id"))] += 1
        for name in serving.budgets:
            if past.decided_at >= since[name]:
                had.sums[name] = had.sums.get(name, 0.0) + float(cast("float", past.action[name]))
    return found


def _narrow(platform: Platform, row: Row, had: Spent) -> None:
    """Keep a row inside what is left for its player: a limit of the law, so that its density stays exact, or the default action."""
    serving, policy, said = platform.serving, row.by.policy, [row.degraded] if row.degraded else []
    if row.default is not None:
        return
    if serving.frequency is not None and had.decisions >= serving.frequency.most:
        row.default = default_action(policy, row.ask)
        if row.default is not None:
            said.append(f"frequency cap: {had.decisions} decisions were made for this player already; the platform's default action is served")
    limits = {name: dict(edges) for name, edges in (row.ask.limits or {}).items()}
    for name, cap in serving.budgets.items():
        low, high = (float(edge[platform.dimension_names.index(name)]) for edge in policy.edges(row.ask.limits))
        left = cap.most - had.sums.get(name, 0.0)
        if left < high and row.default is None:
            limits[name] = {**limits.get(name, {}), "high": max(left, low)}
            said.append(f"budget: {max(left, 0):g} of {cap.most:g} is left of {name}")
    if limits != (row.ask.limits or {}):
        row.ask = replace(row.ask, limits=limits)
    if serving.item_frequency is not None and policy.catalogue is not None and row.default is None:
        barred = {item for item, times in had.items.items() if times >= serving.item_frequency.most}
        allowed = row.ask.eligible or tuple(policy.catalogue.ids)
        if left_over := tuple(item for item in allowed if item not in barred):
            if len(left_over) < len(allowed):
                row.ask = replace(row.ask, eligible=left_over, top_k=row.ask.top_k and min(row.ask.top_k, len(left_over)))
                said.append(f"frequency cap: {len(allowed) - len(left_over)} items were shown to this player as often as they may be")
        else:
            row.default = default_action(policy, row.ask) or _any_item(policy, row.ask)
            said.append("frequency cap: every item was shown to this player as often as it may be; the platform's default action is served")
    row.degraded = "; ".join(said) or None


# ---- what is served instead ------------------------------------------------------------------------------------------------
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


def check(policy: Policy, ask: Ask) -> None:
    """Raises the `RequestError` that says what of a request cannot be answered."""
    policy.check(ask.limits, ask.eligible, ask.top_k or 1, ask.exploration)
    if ask.proposals:
        _check_proposals(policy, ask)


def _check_proposals(policy: Policy, ask: Ask) -> None:
    """Raises `RequestError` for a proposal that could not be served under the request's own limits, whether or not its player is held out.

    Else a mistake would show for the few players alone whom it concerns.
    """
    platform, eligible = policy.platform, None if ask.eligible is None else frozenset(ask.eligible)
    edges = [] if policy.catalogue is not None else list(zip(platform.dimension_names, *policy.edges(ask.limits), strict=True))
    for name, given in cast("Mapping[str, Any]", ask.proposals).items():
        if name not in platform.policies:
            raise RequestError(f"proposals: {name!r} is no policy of this platform; expected {', '.join(platform.policies)}")
        each = {name: given} if set(given) == set(platform.action_columns) else {f"{name}.{player}": action for player, action in given.items()}
        for where, action in each.items():
            if not isinstance(action, Mapping):
                raise RequestError(f"proposals.{where}: expected an action, {{{', '.join(platform.action_columns)}}}, or one for each player, got {action!r}")
            proposed = checked_action(platform, action, f"proposals.{where}")
            if eligible is not None and proposed["item_id"] not in eligible:
                raise RequestError(f"proposals.{where}: {proposed['item_id']!r} is not among the request's eligible items")
            for dimension, low, high in edges:
                if not low <= cast("float", proposed[dimension]) <= high:
                    raise RequestError(f"proposals.{where}.{dimension}: {proposed[dimension]:g} lies outside of the request's limits, {low:g} to {high:g}")


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
    if wrong := [player for player in players if not 0 < len(player) <= LONGEST_ID]:
        raise RequestError(f"players: expected ids of 1 to {LONGEST_ID} characters, got one of {len(wrong[0])}")
    ask = Ask(
        players=tuple(map(str, players)),
        explore=explore,
        exploration=exploration,
        limits=limits,
        eligible=tuple(eligible) if eligible is not None else None,
        top_k=top_k,
    )
    with open_service(platform) as service:
        if capped(platform) and not dry_run and not service.log.turns.wait_and_take(ask.player_ids):
            raise WorkspaceError("a server has been deciding for one of these players for too long; ask again in a moment")
        decided = decide(service, [ask])[0]
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
            gone = forgotten(Workspace(platform.root))
            events = [event for _, event in waiting if event.player_id not in gone]
            at = datetime.now(UTC)
            players = list(dict.fromkeys(e.player_id for e in events))
            if not events:
                service.log.applied([key for key, _ in waiting]).result()
                continue
            rows, _ = online_rows(service, service.current(), players, features.epoch_microseconds(at))
            frame = features.online_table(platform, rows)
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


@dataclass(frozen=True)
class Subject:
    """What an explanation explains: one state, as a batch of one, the policy that looks at it, its action, and what was really done."""

    player_id: str
    policy: Policy
    states: PlayerStates
    action: Action
    logged: Action | None
    decision: Decision | None = None


def subject_of(service: Service, question: Question) -> Subject:
    """A past decision with the model and the state of then, or what would be recommended to a player now.

    Raises `UnknownPlayerError` for a decision that was never served or a player of whom nothing is known, `StoreUnavailable` where that cannot be told.
    """
    platform = service.platform
    if question.decision_id is not None:
        decision = service.log.find(question.decision_id)
        if decision is None:
            raise UnknownPlayerError(f"{question.decision_id}: no decision was served under this id")
        if decision.state is None or decision.model_version is None:
            raise RequestError(
                f"{question.decision_id}: no model decided this, or its state was not kept; ask by player_id to see what would be recommended now"
            )
        policy, states = service.policy_of(decision.model_version), features.unpack_states(platform, [decision.state])
        executed = service.log.known([decision.decision_id])[decision.decision_id].executed
        logged: Action = executed if isinstance(executed, dict) else decision.action
        return Subject(decision.player_id, policy, states, decision.action, logged, decision)
    assert question.player_id is not None
    player_id, policy = question.player_id, service.current().policy
    reading = read_states(service, service.current(), [player_id], datetime.now(UTC))
    must_know(reading, player_id)
    best = draw(policy, policy.encode(reading.states), Ask(players=(player_id,), explore=False), np.zeros(1, np.uint64))
    return Subject(player_id, policy, reading.states, action_dicts(platform, best.action)[0], _last_action(service, reading.states, policy, player_id))


def explain_question(service: Service, question: Question) -> dict[str, Any]:
    """The answer of `POST /v1/explanations`; raises as `subject_of` does."""
    return explain_subject(service, subject_of(service, question), question)


def explain_subject(service: Service, subject: Subject, question: Question, *, attributions: bool = True) -> dict[str, Any]:
    """The same of a subject that was found already; without `attributions` some hundred times faster."""
    from fastq.explanation import as_dict, explain

    policy, states = subject.policy, subject.states
    against = alternative(service, policy, question.against, subject.logged)
    why = explain(policy, states, actions=as_array(policy, subject.action), against=against, weights=question.weights, attributions=attributions)
    return as_dict(why, 0, decision_id=question.decision_id, player_id=subject.player_id, model_version=policy.version)


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
    if recent:
        return recent[-1].action
    if policy.catalogue is None and states.actions is not None:
        done = states.actions[0][~np.isnan(states.actions[0]).any(1)]
        if len(done):
            return dict(zip(policy.platform.dimension_names, map(float, done[-1]), strict=True))
    return None


def alternative(service: Service, policy: Policy, against: str | Mapping[str, Any] | None, logged: Action | None = None) -> Any:
    """What `fastq.explanation.explain` takes as the alternative. Raises `RequestError` that says what could be named."""
    platform = policy.platform
    if against is None or (isinstance(against, str) and against in policy.policies):
        return against
    if not isinstance(against, str):
        return checked_action(platform, against, "against")
    if against == "logged":
        if logged is None:
            raise RequestError("against: nothing is logged of this player inside the window; name a policy or an action")
        return ("logged", as_array(policy, logged))
    if against.startswith("model:") and against != "model:":
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
