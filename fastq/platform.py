"""`fastq.yaml` as one frozen tree: read, checked, fingerprinted.

Defaults live here and nowhere else. A function elsewhere takes the branch it needs, or the whole `Platform` where it needs
several; nobody reads the file a second time.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from fastq.errors import ConfigurationError

FILE_NAME = "fastq.yaml"
OWN_POLICY = "fastq"  # the name under which served decisions come back as one more behaviour policy
RESERVED_COLUMNS = frozenset(  # of the logs, of the offline and online feature tables, and fields of requests
    [
        *("decision_id", "player_id", "decided_at", "policy", "propensity", "assignment", "item_id", "model_version"),
        *("occurred_at", "recorded_at", "known_at", "valid_from", "reason"),
        *("window", "counts", "period", "seen_at", "decided", "row", "event_timestamp", "created_timestamp"),
        *("executed", "correct"),
    ]
)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_duration(value: object) -> object:
    """`90s`, `15m`, `6h`, `1d`, `2w` as a timedelta; anything else is left for pydantic to refuse."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+)\s*([smhdw])\s*", value)):
        try:
            return timedelta(**{_UNITS[match[2]]: int(match[1])})
        except OverflowError:
            raise ValueError("expected a duration of at most 1000w") from None
    if isinstance(value, timedelta):
        return value
    raise ValueError("expected a duration such as 6h, 1d or 2w")


def format_duration(value: timedelta) -> str:
    """The shortest text that `parse_duration` reads back."""
    seconds = round(value.total_seconds())
    for unit, size in (("w", 604_800), ("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _positive(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        raise ValueError("expected a duration longer than zero")
    if value > timedelta(weeks=1000):  # so that a window of them is still a span of time
        raise ValueError("expected a duration of at most 1000w")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


Duration = Annotated[timedelta, BeforeValidator(parse_duration), AfterValidator(_positive), PlainSerializer(format_duration, return_type=str)]
Finite = Annotated[float, AfterValidator(_finite)]


class _Branch(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(cached_property,))


class Logs(_Branch):
    """Where the tables are: a path, a glob or an object-store URL, relative to the workspace, or `{uri, query}` for a database."""

    class Query(_Branch):
        uri: str
        query: str

    decisions: str | Query
    activity: str | Query | None = None
    players: str | Query | None = None
    proposals: str | Query | None = None
    items: str | Query | None = None


class Measure(_Branch):
    """How a player's events become one number per period; `min` and `max` are validation rules for every event."""

    aggregate: Literal["sum", "mean", "min", "max", "last", "count"] = "sum"
    min: Finite | None = None
    max: Finite | None = None

    @property
    def of_a_period(self) -> tuple[float, float]:
        """Between what a period's number lies where every event keeps to `min` and `max`.

        A sum of several events passes any bound but one on its own side of 0, and a count says nothing of their values.
        """
        low, high = -math.inf if self.min is None else self.min, math.inf if self.max is None else self.max
        if self.aggregate == "count":
            return 0.0, math.inf
        if self.aggregate == "sum":
            return low if low >= 0 else -math.inf, high if high <= 0 else math.inf
        return low, high


class Attribute(_Branch):
    kind: Literal["numeric", "categorical"]


LONGEST = 1e11  # seconds of an absence: more than any log spans, and moments that long after another can still be told in microseconds


class State(_Branch):
    """What is known of a player when a decision is made."""

    period: Duration = timedelta(days=1)  # grid on which a history is laid
    window: int = Field(30, ge=1, le=1_000)  # periods
    churn: int = Field(14, ge=1)  # periods without activity after which an episode is terminated
    measures: dict[str, Measure] = {}
    attributes: dict[str, Attribute] = {}

    @model_validator(mode="after")
    def _within_a_calendar(self) -> State:
        if self.churn * self.period.total_seconds() > LONGEST:
            raise ValueError(f"churn: expected at most {int(LONGEST / self.period.total_seconds()):,} periods, which is {LONGEST / 31_557_600:,.0f} years")
        return self


class Dimension(_Branch):
    """One bounded dimension of a continuous action, in the unit that the logs use."""

    low: Finite
    high: Finite
    unit: str = ""
    step: Annotated[float, Field(gt=0)] | None = None  # the grid on which the law lives

    @model_validator(mode="after")
    def _ordered(self) -> Dimension:
        if not self.low < self.high:
            raise ValueError(f"expected low < high, got low {self.low:g} and high {self.high:g}")
        if self.step and self.step > self.high - self.low:
            raise ValueError(f"expected a step no larger than high - low = {self.high - self.low:g}, got {self.step:g}")
        return self


class ContinuousAction(_Branch):
    kind: Literal["continuous"]
    dimensions: dict[str, Dimension] = Field(min_length=1)
    default: dict[str, Finite] | None = None  # served when nothing at all is known of a player; else the middle of the bounds

    @model_validator(mode="after")
    def _default_in_bounds(self) -> ContinuousAction:
        if self.default is not None and set(self.default) != set(self.dimensions):
            raise ValueError(f"default: expected one value for each of {', '.join(self.dimensions)}")
        for name, value in (self.default or {}).items():
            if not self.dimensions[name].low <= value <= self.dimensions[name].high:
                raise ValueError(f"default: {name} {value:g} is outside its bounds")
        return self


class CatalogueAction(_Branch):
    kind: Literal["catalogue"]
    features: dict[str, Attribute] = {}  # item features; without any, items are told apart by their id alone
    default: str | None = None  # item served when nothing at all is known of a player


class Objective(_Branch):
    """One quantity that follows a decision. `discount` is per period; `ceiling` and `floor` bound its mean immediate value."""

    weight: Finite = 1.0
    discount: Annotated[float, Field(ge=0, lt=1)] = 0.9
    known_after: Duration | None = None  # when its value is known; default one period
    ceiling: Finite | None = None
    floor: Finite | None = None


PAPER = {"epochs": 100, "batch_size": 1024, "learning_rate": 3e-4, "balance": 0.1}  # what preset `paper` says of them: arXiv 2504.21383


class Training(_Branch):
    """How a policy is learned; sizes are those measured in infra/log.md. A preset says what the file does not."""

    preset: Literal["default", "paper"] = "default"
    epochs: int = Field(50, ge=1)  # upper bound; training stops earlier when held-out players stop improving
    seed: int = 0
    holdout: float = Field(0.3, gt=0, lt=1)  # share of players who are never trained on, only evaluated on
    batch_size: int = Field(1024, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    balance: float = Field(0.1, ge=0)  # final strength of the gradient reversal (paper: 0.1)
    horizon: int = Field(4, ge=1)  # decisions whose outcomes stage 1 sums; twice as many where people's own responses are asked about
    caution: float | None = Field(None, ge=0)  # standard deviations of doubt subtracted before ranking; None: what `Policy.caution` has
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"  # where networks learn; auto: on CUDA where there is one, several workers on their processors
    workers: int = Field(1, ge=1)  # processes that learn together, on the cluster that `services.ray` names
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.025  # error rate of the promotion gate

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        return {**PAPER, **given} if isinstance(given, dict) and given.get("preset") == "paper" else given

    @model_validator(mode="after")
    def _whole_parts(self) -> Training:
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size: expected a multiple of workers ({self.workers}), so that each has an equal part of every batch, got {self.batch_size}"
            )
        if self.workers > 1 and self.accelerator == "cuda":  # tried on one device alone
            raise ValueError("accelerator: several workers learn on their processors; expected auto or cpu, or workers: 1")
        if self.workers > 1 and self.preset == "paper":
            raise ValueError("workers: the published form is learned by one process; expected 1")
        return self


class Holdout(_Branch):
    share: float = Field(0.0, ge=0, lt=1)
    policy: str | None = None


class Challenger(_Branch):
    """A second model beside the champion. Whose decisions a player gets is a function of their id alone."""

    version: str | None = None  # default: the registry's alias `challenger`
    share: float = Field(0.0, ge=0, lt=1)  # of the players who are not held out
    shadow: bool = False  # what it would have done is logged beside every decision of the champion's, and served to nobody


class Cap(_Branch):
    """At most `most` per player in the last `per`: decisions of fastq's, or the sum of one action dimension over them."""

    most: float = Field(ge=0)
    per: Duration | None = None  # default: a period


class Tokens(_Branch):
    """JSON Web Tokens of somebody else's sign-in, beside our own keys."""

    jwks: str  # https URL of the issuer's public keys, or a file of them
    issuer: str
    audience: str
    role_claim: str = "role"  # recommend, analyst or admin, or a list of them


class Serving(_Branch):
    exploration: float = Field(0.05, ge=0, le=1)  # standard deviation of the logged noise, as a share of each dimension's range
    holdout: Holdout = Holdout()
    challenger: Challenger = Challenger()
    frequency: Cap | None = None  # decisions of fastq's per player; past it the default action is served
    item_frequency: Cap | None = None  # the same item to the same player; past it the item is not eligible
    budgets: dict[str, Cap] = {}  # by action dimension; what is left of it is a limit of the law
    rate_limit: float = Field(0, ge=0)  # requests per second and key; 0: none
    replicas: int = Field(1, ge=1, le=32)  # processes of `fastq serve` that answer; with two of them one may die, and what the other does nobody notices
    tokens: Tokens | None = None
    exclude: str | None = None  # file with a column player_id: players who are never recommended anything
    stale_after: int = Field(3, ge=1)  # periods without anything seen after which an answer is marked degraded


class Evaluation(_Branch):
    segments: list[str] = []  # categorical attributes: the gate asks for enough evidence, and no harm shown, in each of their values


class Validation(_Branch):
    max_quarantined: float = Field(0.01, ge=0, le=1)  # share of rows above which the gate fails
    max_shift: float = Field(0.25, gt=0)  # population stability index, against the logs that were last accepted, above which a warning is given
    stop: list[str] = []  # rules that would warn or quarantine, but shall fail the gate


class Services(_Branch):
    """Outside systems; every default is embedded in the workspace."""

    mlflow: str = "sqlite"
    online_store: str = "sqlite"
    ray: str = "local"


class Operations(_Branch):
    """How the platform runs by itself."""

    webhook: str | None = None  # where refusals, failures and findings are posted as JSON; the environment's FASTQ_WEBHOOK wins
    step_limit: Duration = timedelta(hours=6)  # that one step of a retraining may take
    keep_states: Duration = timedelta(days=90)  # for which served decisions keep the state they saw, for explanations as of then
    # what `compact` deletes when it is older; none: nothing
    keep_quarantine: Duration | None = timedelta(days=90)  # rows that the gate refused
    keep_reports: Duration | None = timedelta(days=365)  # of the logs, and pictures of what the monitor found; a model's go with the model
    keep_models: Duration | None = timedelta(days=365)  # that never were champion and that no decision's explanation needs, with their MLflow runs
    keep_runs: Duration | None = timedelta(days=90)  # of flows, in Prefect's books, with their small results
    keep_backups: Duration | None = None  # after which backups made here are deleted where they were written, all but the newest; none: never


class Platform(_Branch):
    """One platform, as its `fastq.yaml` describes it."""

    version: Literal[1] = 1
    platform: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
    logs: Logs
    state: State
    policies: list[str] = Field(min_length=1)
    assignment: Literal["decision", "player"] = "decision"
    action: Annotated[ContinuousAction | CatalogueAction, Field(discriminator="kind")]
    objectives: dict[str, Objective] = Field(min_length=1)
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    serving: Serving = Serving()
    services: Services = Services()
    validation: Validation = Validation()
    operations: Operations = Operations()
    root: Path = Field(Path(), exclude=True)  # the workspace: where the file stands

    @model_validator(mode="after")
    def _names_agree(self) -> Platform:
        if len(set(self.policies)) != len(self.policies):
            raise ValueError("policies: expected each name once")
        if OWN_POLICY in self.policies:
            raise ValueError(f"policies: {OWN_POLICY!r} is the name of fastq's own decisions; choose another")
        columns = [*self.state.measures, *self.state.attributes, *self.dimension_names, *self.objectives]
        twice = {c for c in columns if columns.count(c) > 1}
        if twice:
            raise ValueError(f"measures, attributes, dimensions and objectives need names of their own; used twice: {', '.join(sorted(twice))}")
        features = self.action.features if isinstance(self.action, CatalogueAction) else {}
        if reserved := RESERVED_COLUMNS.intersection([*columns, *features]):
            raise ValueError(f"{', '.join(sorted(reserved))}: reserved column name")
        if self.state.measures and self.logs.activity is None:
            raise ValueError("logs.activity: expected a path, since state.measures names measures")
        if self.state.attributes and self.logs.players is None:
            raise ValueError("logs.players: expected a path, since state.attributes names attributes")
        if isinstance(self.action, CatalogueAction) and self.action.features and self.logs.items is None:
            raise ValueError("logs.items: expected a path, since action.features names item features")
        if self.serving.holdout.policy is not None and self.serving.holdout.policy not in self.policies:
            raise ValueError(f"serving.holdout.policy: expected one of {', '.join(self.policies)}")
        if unknown := [name for name in self.serving.budgets if name not in self.dimension_names]:
            raise ValueError(f"serving.budgets: {unknown[0]!r} is no action dimension; expected {', '.join(self.dimension_names) or 'none for a catalogue'}")
        if self.serving.item_frequency is not None and self.dimension_names:
            raise ValueError("serving.item_frequency: expected only where actions are items of a catalogue")
        categories = [name for name, attribute in self.state.attributes.items() if attribute.kind == "categorical"]
        for name in self.evaluation.segments:
            if name not in categories:
                raise ValueError(
                    f"evaluation.segments: {name!r} is no categorical attribute; expected some of {', '.join(categories) or 'none, there are none'}"
                )
        return self

    @property
    def dimension_names(self) -> list[str]:
        """Names of the action columns of a continuous action, in order; none for a catalogue."""
        return list(self.action.dimensions) if isinstance(self.action, ContinuousAction) else []

    @property
    def action_columns(self) -> list[str]:
        """The columns that hold an action in the logs."""
        return self.dimension_names or ["item_id"]

    @cached_property
    def bounds(self) -> np.ndarray:
        """[D, 2] low and high of each dimension, in raw units."""
        dimensions = self.action.dimensions.values() if isinstance(self.action, ContinuousAction) else []
        return np.array([[d.low, d.high] for d in dimensions], float).reshape(-1, 2)

    @cached_property
    def steps(self) -> np.ndarray:
        """[D] grid step of each dimension in raw units, 0 where the dimension is continuous."""
        dimensions = self.action.dimensions.values() if isinstance(self.action, ContinuousAction) else []
        return np.array([d.step or 0.0 for d in dimensions], float)

    @cached_property
    def weights(self) -> np.ndarray:
        """[M] signed objective weights."""
        return np.array([o.weight for o in self.objectives.values()], float)

    @cached_property
    def discounts(self) -> np.ndarray:
        """[M] discount per period of each objective."""
        return np.array([o.discount for o in self.objectives.values()], float)

    @cached_property
    def known_after(self) -> np.ndarray:
        """[M] periods after a decision at which each objective's value is known."""
        return np.array([(o.known_after or self.state.period) / self.state.period for o in self.objectives.values()], float)

    def default_action(self) -> dict[str, float] | dict[str, str | None]:
        """What is served when nothing at all is known of a player."""
        if isinstance(self.action, CatalogueAction):
            return {"item_id": self.action.default}
        return self.action.default or {name: (d.low + d.high) / 2 for name, d in self.action.dimensions.items()}

    def fingerprint(self) -> str:
        """sha256 over what a model depends on: state, policies, action and objectives' names and discounts, not weights or services."""
        tree = self.model_dump(mode="json", include={"platform", "state", "policies", "action"})
        tree["objectives"] = {n: o.model_dump(mode="json", include={"discount", "known_after"}) for n, o in self.objectives.items()}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def load_platform(path: str | Path = FILE_NAME) -> Platform:
    """Read and check a platform file; its directory becomes the workspace (`Platform.root`).

    Raises `ConfigurationError` that names the file, the key path and what was expected there.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file; run `fastq init DIR --decisions …` to write one, or name its directory with --workspace") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigurationError(f"{path}: expected a mapping with the keys {', '.join(_known_keys(Platform))}")
    return platform_from_tree(tree, path.parent, str(path))


def platform_from_tree(tree: dict[str, Any], root: Path, source: str) -> Platform:
    """Check a tree that came from `source` (a file's name, for the error's text)."""
    if "root" in tree:
        raise ConfigurationError(f"{source}: root: unknown key; known keys: {', '.join(_known_keys(Platform))}")
    try:
        return Platform.model_validate({**tree, "root": root.resolve()})
    except ValidationError as error:
        # a path or a query: both complain, but only the one that was meant is of use
        told = [e for e in error.errors() if e["loc"][-1:] != (("str",) if isinstance(e["input"], dict) else ("Query",))]
        raise ConfigurationError("\n".join(_sentence(source, e) for e in told)) from None


def _known_keys(model: type[BaseModel]) -> list[str]:
    return [name for name in model.model_fields if name != "root"]


def _branch_at(path: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model whose keys stand at `path`, found by walking the annotations."""
    here: Any = Platform
    for step in path:
        candidates = [here, *get_args(here)]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        named = [m for m in models if isinstance(step, str) and step in m.model_fields]
        if named:
            here = named[0].model_fields[str(step)].annotation
        elif step in ("continuous", "catalogue"):
            here = ContinuousAction if step == "continuous" else CatalogueAction
        elif values := [c for c in get_args(here) if c is not str]:
            here = values[0]
        else:
            return None
    return next((c for c in [here, *get_args(here)] if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _sentence(source: str, error: Any) -> str:
    """One pydantic complaint as a sentence with file, key path and what was expected."""
    location = tuple(step for step in error["loc"] if step not in ("continuous", "catalogue", "str", "Query"))
    key = ".".join(str(step) if str(step).isprintable() else repr(step) for step in location) or "the file"
    if error["type"] == "extra_forbidden":
        branch = _branch_at(error["loc"][:-1])
        known = _known_keys(branch) if branch else []
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{source}: {key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{source}: {key}: missing; expected a value here"
    if error["type"] == "model_type" and (branch := _branch_at(error["loc"])):
        return f"{source}: {key}: expected a mapping with the keys {', '.join(_known_keys(branch))}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error.get("input"), dict | list) else f", got {error.get('input')!r}"
    return f"{source}: {key}: {message[0].lower() + message[1:]}{given}"
