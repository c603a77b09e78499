"""What may be asked over HTTP, checked by pydantic before anything else sees it; the names of measures, objectives and dimensions are the platform's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, create_model

from fastq.errors import RequestError
from fastq.features import epoch_microseconds
from fastq.platform import Platform
from fastq.records import LARGEST
from serving import online
from serving.decision_log import Event, Reported, now_us
from serving.online import Ask, InlineState, Question

MOST_PLAYERS = 1_000  # in one request
MOST_ROWS = 10_000  # outcomes or events in one request
MOST_SQL = 100_000  # characters of a query
CLOCK_SKEW_SECONDS = 300  # how far ahead of ours a caller's clock may be


class Asked(BaseModel):
    """Every request: unknown fields are refused, numbers are finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


Number = Annotated[StrictFloat | StrictInt, Field(ge=-LARGEST, le=LARGEST)]


def _an_id(value: object) -> object:
    """Ids may come as integers; inside they are strings."""
    return str(value) if type(value) is int else value


PlayerId = Annotated[
    StrictStr, BeforeValidator(_an_id, json_schema_input_type=str | int), Field(min_length=1, max_length=online.LONGEST_ID, examples=["p00001"])
]


class Edges(Asked):
    low: Number | None = None
    high: Number | None = None


class State(Asked):
    """A player's state in raw units, as far as the caller knows it; null where nothing is known."""

    player_id: PlayerId
    history: Annotated[list[list[Number | None]], Field(description="one row per period of the window, oldest first, one number per measure")]
    attributes: dict[str, Number | StrictStr | None] = {}
    actions: Annotated[
        list[list[Number | None]] | list[StrictStr | None] | None, Field(description="what was done in each period: action dimensions, or item ids")
    ] = None
    objectives: Annotated[list[list[Number | None]] | None, Field(description="what followed in each period")] = None
    policy: StrictStr | None = None


class RecommendationRequest(Asked):
    """Exactly one of `players` and `states`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"players": ["p00001", "p00002"], "explore": True}, {"players": ["p00001"], "limits": {"bonus": {"high": 20}}, "dry_run": True}]
        }
    )

    players: Annotated[list[PlayerId] | None, Field(min_length=1, max_length=MOST_PLAYERS)] = None
    states: Annotated[list[State] | None, Field(min_length=1, max_length=MOST_PLAYERS)] = None
    explore: StrictBool = True
    dry_run: StrictBool = False
    eligible: Annotated[list[StrictStr] | None, Field(min_length=1)] = None
    limits: dict[str, Edges] | None = None
    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    exploration: Annotated[Number, Field(ge=0, le=1)] | None = None
    proposals: Annotated[
        dict[str, dict[str, Any]] | None, Field(description="{policy: action} or {policy: {player: action}}, for players who are held out")
    ] = None

    def ask(self) -> Ask:
        if (self.players is None) == (self.states is None):
            raise RequestError("expected exactly one of players and states")
        limits = {name: {k: float(v) for k, v in edges.model_dump(exclude_none=True).items()} for name, edges in self.limits.items()} if self.limits else None
        return Ask(
            players=tuple(self.players or ()),
            states=tuple(InlineState(s.player_id, s.history, s.attributes, s.actions, s.objectives, s.policy) for s in self.states or ()),
            explore=self.explore,
            exploration=self.exploration,
            limits=limits,
            eligible=tuple(self.eligible) if self.eligible else None,
            top_k=self.top_k,
            proposals=self.proposals,
        )


class ExplanationRequest(Asked):
    """Exactly one of `decision_id` and `player_id`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"player_id": "p00001", "weights": {"cost": -2}}]})

    decision_id: StrictStr | None = None
    player_id: PlayerId | None = None
    against: Annotated[StrictStr | dict[str, Number | StrictStr] | None, Field(description="a behaviour policy, logged, model:VERSION, or an action")] = None
    weights: dict[str, Number] | None = None

    def question(self) -> Question:
        if (self.decision_id is None) == (self.player_id is None):
            raise RequestError("expected exactly one of decision_id and player_id")
        return Question(self.decision_id, self.player_id, self.against, self.weights)


class QueryRequest(Asked):
    """One SELECT over the views that `fastq query --tables` lists."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"sql": "SELECT policy, count(*) FROM decisions GROUP BY policy"}]})

    sql: Annotated[StrictStr, Field(min_length=1, max_length=MOST_SQL)]


class QueryAnswer(BaseModel):
    columns: list[str]
    rows: list[list[Any]]
    truncated: bool


class Recommended(BaseModel):
    player_id: str
    decision_id: str
    decided_at: str
    action: dict[str, float | str | None]
    units: dict[str, str]
    propensity: float | None
    value: float | None
    by_objective: dict[str, float] | None
    policy: str
    model_version: str | None
    degraded: str | None
    ranking: list[str] | None = None


class Recommendations(BaseModel):
    recommendations: list[Recommended]


class Accepted(BaseModel):
    accepted: int
    already_known: int


class Problem(BaseModel):
    """RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


def outcome_request(platform: Platform) -> type[Asked]:
    """The body of `POST /v1/outcomes`: one field per objective of this platform."""
    fields: dict[str, Any] = {f"objective_{i}": (Number | None, Field(None, alias=name)) for i, name in enumerate(platform.objectives)}
    instead = dict[str, Number | StrictStr]
    row = create_model(
        "Outcome",
        __base__=Asked,
        decision_id=(StrictStr, ...),
        executed=(StrictBool | instead | None, Field(None, description="false, or the action that was executed instead")),
        **fields,
    )
    return create_model(
        "OutcomeRequest",
        __base__=Asked,
        outcomes=(list[row], Field(min_length=1, max_length=MOST_ROWS)),
        correct=(StrictBool, Field(False, description="replace values that are known already")),
    )


def activity_request(platform: Platform) -> type[Asked]:
    """The body of `POST /v1/activity`: one field per measure of this platform, within its bounds."""
    fields: dict[str, Any] = {
        f"measure_{i}": (Annotated[Number, Field(ge=m.min, le=m.max)] | None, Field(None, alias=name))
        for i, (name, m) in enumerate(platform.state.measures.items())
    }
    row = create_model("Event", __base__=Asked, player_id=(PlayerId, ...), occurred_at=(AwareDatetime, ...), **fields)
    return create_model("ActivityRequest", __base__=Asked, events=(list[row], Field(min_length=1, max_length=MOST_ROWS)))


def reported_outcomes(platform: Platform, body: Any) -> list[Reported]:
    """Outcomes as the decision log takes them. Raises `RequestError`."""
    names, reported = list(platform.objectives), []
    for i, row in enumerate(body.outcomes):
        values = {name: float(value) for k, name in enumerate(names) if (value := getattr(row, f"objective_{k}")) is not None}
        executed = (
            online.checked_action(platform, row.executed, f"outcomes[{i}].executed")
            if isinstance(row.executed, dict)
            else False
            if row.executed is False
            else None
        )
        if not values and row.executed is None:
            raise RequestError(f"outcomes[{i}]: expected at least one of {', '.join(names)} or executed")
        reported.append(Reported(row.decision_id, values, executed))
    return reported


def posted_events(platform: Platform, body: Any) -> list[Event]:
    """Events as the decision log takes them. Raises `RequestError`."""
    names, events, latest = list(platform.state.measures), [], now_us() + CLOCK_SKEW_SECONDS * 1_000_000
    for i, row in enumerate(body.events):
        values = {name: float(value) for k, name in enumerate(names) if (value := getattr(row, f"measure_{k}")) is not None}
        if not values:
            raise RequestError(f"events[{i}]: expected a value for at least one of {', '.join(names) or 'no measure: this platform has none'}")
        occurred_at = epoch_microseconds(row.occurred_at)
        if not 0 <= occurred_at <= latest:
            when = "in the future; expected what has happened" if occurred_at > latest else "before 1970"
            raise RequestError(f"events[{i}].occurred_at: {row.occurred_at.isoformat()} lies {when}")
        events.append(Event(row.player_id, occurred_at, values))
    return events
