"""`fastq.yaml`: what is read, what each default is, and that every mistake is one sentence with file, key and what was expected."""

from __future__ import annotations

import contextlib
import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fastq.errors import ConfigurationError
from fastq.platform import CatalogueAction, Measure, Platform, format_duration, load_platform, parse_duration, platform_from_tree

CONTRACT = """
version: 1
platform: arena
logs:
  decisions: logs/decisions/*.parquet
  activity: logs/activity/*.parquet
  players: logs/players.parquet
  proposals: logs/proposals/*.parquet
state:
  period: 1d
  window: 30
  churn: 14
  measures:
    games:    {aggregate: sum, min: 0}
    win_rate: {aggregate: mean, min: 0, max: 1}
  attributes:
    tenure_days: {kind: numeric}
    region:      {kind: categorical}
policies: [stretch, retain, spend]
assignment: decision
action:
  kind: continuous
  default: {target_games: 5, bonus: 0}
  dimensions:
    target_games: {low: 1, high: 20, unit: games, step: 1}
    bonus:        {low: 0, high: 50, unit: INR}
objectives:
  returns:    {weight: 1.0}
  ltv:        {weight: 1.0, discount: 0.95, known_after: 7d}
  engagement: {weight: 1.0, discount: 0.7}
  dwell:      {weight: 1.0}
  cost:       {weight: -1.0, ceiling: 0.12}
training: {preset: default, epochs: 50, seed: 0}
serving:
  exploration: 0.05
  holdout: {share: 0, policy: retain}
  exclude: logs/excluded.csv
services:
  mlflow: sqlite
  online_store: sqlite
  ray: local
"""
CATALOGUE: dict[str, Any] = {
    "platform": "shelf",
    "logs": {"decisions": "d.csv", "items": "items.csv"},
    "state": {"period": "6h", "window": 1},
    "policies": ["random"],
    "action": {"kind": "catalogue", "features": {"price": {"kind": "numeric"}}},
    "objectives": {"click": {"discount": 0}},
}


def load(root: Path, tree: dict[str, Any] | str) -> Platform:
    (root / "fastq.yaml").write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return load_platform(root / "fastq.yaml")


def changed(path: str, value: object) -> dict[str, Any]:
    """The contract's tree with one key set; `...` deletes it."""
    tree: dict[str, Any] = yaml.safe_load(CONTRACT)
    *branches, key = path.split(".")
    here = tree
    for branch in branches:
        here = here[branch]
    if value is ...:
        del here[key]
    else:
        here[key] = value
    return tree


def refusal(root: Path, tree: dict[str, Any] | str) -> str:
    with pytest.raises(ConfigurationError) as error:
        load(root, tree)
    assert error.value.exit_code == 2
    return str(error.value)


def test_the_contracts_own_example_is_read_as_it_stands(tmp_path: Path) -> None:
    platform = load(tmp_path, CONTRACT)
    assert platform.root == tmp_path
    assert platform.dimension_names == platform.action_columns == ["target_games", "bonus"]
    np.testing.assert_array_equal(platform.bounds, [[1, 20], [0, 50]])
    np.testing.assert_array_equal(platform.steps, [1, 0])
    np.testing.assert_array_equal(platform.weights, [1, 1, 1, 1, -1])
    np.testing.assert_array_equal(platform.discounts, [0.9, 0.95, 0.7, 0.9, 0.9])
    np.testing.assert_array_equal(platform.known_after, [1, 7, 1, 1, 1])
    assert platform.default_action() == {"target_games": 5, "bonus": 0}
    assert platform.state.measures["win_rate"].max == 1
    assert platform.objectives["cost"].ceiling == 0.12


def test_only_six_keys_must_be_there_and_the_rest_has_defaults(tmp_path: Path) -> None:
    platform = load(tmp_path, CATALOGUE)
    assert isinstance(platform.action, CatalogueAction)
    assert (platform.dimension_names, platform.action_columns, platform.bounds.shape) == ([], ["item_id"], (0, 2))
    assert (platform.state.period, platform.state.churn, platform.validation.max_quarantined) == (timedelta(hours=6), 14, 0.01)
    assert platform.services.mlflow == platform.services.online_store == "sqlite"
    for key in ("platform", "logs", "state", "policies", "action", "objectives"):
        assert f"{key}: missing" in refusal(tmp_path, {k: v for k, v in CATALOGUE.items() if k != key})


def test_the_middle_of_the_bounds_is_served_where_no_default_is_given(tmp_path: Path) -> None:
    assert load(tmp_path, changed("action.default", ...)).default_action() == {"target_games": 10.5, "bonus": 25}


def test_a_directory_stands_for_the_file_in_it_and_the_tree_is_frozen(tmp_path: Path) -> None:
    load(tmp_path, CONTRACT)
    platform = load_platform(tmp_path)
    with pytest.raises(ValidationError):
        platform.state.window = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("state", 5, "state: expected a mapping with the keys period, window, churn, measures, attributes"),
        ("objectives.cost", -1, "objectives.cost: expected a mapping with the keys weight, discount, known_after, ceiling, floor"),
        ("state.windw", 3, "state.windw: unknown key; did you mean 'window'?"),
        ("state.colour", 3, "state.colour: unknown key; known keys: period, window, churn, measures, attributes"),
        ("objectives.cost.ceilling", 3, "objectives.cost.ceilling: unknown key; did you mean 'ceiling'?"),
        ("action.dimensions.bonus.hihg", 3, "action.dimensions.bonus.hihg: unknown key; did you mean 'high'?"),
        ("action.feature", 3, "action.feature: unknown key; known keys: kind, dimensions, default"),
        ("logs.decision", "x", "logs.decision: unknown key; did you mean 'decisions'?"),
        ("serving.holdout.shar", 1, "serving.holdout.shar: unknown key; did you mean 'share'?"),
        ("state.measures.games.agregate", "sum", "state.measures.games.agregate: unknown key; did you mean 'aggregate'?"),
        ("polices", ["x"], "polices: unknown key; did you mean 'policies'?"),
        ("root", "/", "root: unknown key"),
        ("state.window", "many", "state.window: "),
        ("state.window", 0, "state.window: "),
        ("state.period", "1 fortnight", "state.period: expected a duration such as 6h, 1d or 2w, got '1 fortnight'"),
        ("state.period", "0d", "state.period: expected a duration longer than zero"),
        ("state.period", "99999999999w", "state.period: "),
        ("state.churn", 10**10, "state: churn: expected at most 1,157,407 periods, which is 3,169 years"),
        ("state.measures.games.aggregate", "median", "state.measures.games.aggregate: "),
        ("state.measures.games.min", float("nan"), "state.measures.games.min: expected a finite number"),
        ("state.attributes.region.kind", "text", "state.attributes.region.kind: "),
        ("policies", [], "policies: "),
        ("policies", ["a", "a"], "policies: expected each name once"),
        ("policies", ["fastq"], "policies: 'fastq' is the name of fastq's own decisions"),
        ("policies", "retain", "policies: "),
        ("action.kind", "discrete", "action"),
        ("action.kind", ..., "action"),
        ("action.dimensions", {}, "action.dimensions: "),
        ("action.dimensions.bonus", {"low": 5, "high": 1}, "action.dimensions.bonus: expected low < high, got low 5 and high 1"),
        ("action.dimensions.bonus.low", float("-inf"), "action.dimensions.bonus.low: expected a finite number"),
        ("action.dimensions.bonus.step", 0, "action.dimensions.bonus.step: "),
        ("action.dimensions.bonus.step", 51, "action.dimensions.bonus: expected a step no larger than high - low = 50, got 51"),
        ("action.default", {"bonus": 1}, "action: default: expected one value for each of target_games, bonus"),
        ("action.default.bonus", 51, "action: default: bonus 51 is outside its bounds"),
        ("objectives", {}, "objectives: "),
        ("objectives.cost.weight", float("nan"), "objectives.cost.weight: expected a finite number"),
        ("objectives.cost.discount", 1, "objectives.cost.discount: "),
        ("objectives.games", {}, "used twice: games"),
        ("objectives.player_id", {}, "player_id: reserved column name"),
        ("objectives.executed", {}, "executed: reserved column name"),  # a field of POST /v1/outcomes
        ("state.attributes.seen_at", {"kind": "numeric"}, "seen_at: reserved column name"),  # a column of the online store
        ("state.measures.row", {"aggregate": "sum"}, "row: reserved column name"),  # a column of the offline table
        ("logs.activity", ..., "logs.activity: expected a path, since state.measures names measures"),
        ("logs.players", ..., "logs.players: expected a path, since state.attributes names attributes"),
        ("logs.decisions", {"uri": "x"}, "logs.decisions.query: missing"),
        ("logs.decisions", {"uri": "x", "query": "y", "table": "z"}, "logs.decisions.table: unknown key"),
        ("logs.decisions", 5, "logs.decisions: "),
        ("serving.holdout.policy", "nobody", "serving.holdout.policy: expected one of stretch, retain, spend"),
        ("serving.exploration", -1, "serving.exploration: "),
        ("platform", "../up", "platform: "),
        ("version", 2, "version: "),
        ("assignment", "session", "assignment: "),
        ("training.preset", "fast", "training.preset: "),
    ],
)
def test_a_mistake_is_one_sentence_with_file_key_and_what_was_expected(tmp_path: Path, path: str, value: object, says: str) -> None:
    said = refusal(tmp_path, changed(path, value))
    assert "\n" not in said, said
    assert said.startswith(f"{tmp_path / 'fastq.yaml'}: "), said
    assert says in said, said


def test_several_mistakes_are_a_sentence_each(tmp_path: Path) -> None:
    tree = changed("state.windw", 3)
    tree["policies"] = []
    assert len(refusal(tmp_path, tree).splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [1", "not valid YAML"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"", "expected a mapping with the keys version, platform, logs"),
        (b"- 1\n- 2\n", "expected a mapping"),
        (b"platform: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        (b"{1: 2, a: b}\n", "1: keys should be strings"),
        (b"a: &a [*a]\n", "a: unknown key"),
        (b"? [x]\n: y\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_platform_file_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "fastq.yaml").write_bytes(content)
    with pytest.raises(ConfigurationError) as error:
        load_platform(tmp_path)
    assert str(tmp_path / "fastq.yaml") in str(error.value)
    assert says in str(error.value)


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"fastq\.yaml: no such file; run `fastq init"):
        load_platform(tmp_path)


def test_the_fingerprint_changes_with_what_a_model_depends_on_and_with_nothing_else(tmp_path: Path) -> None:
    first = load(tmp_path, CONTRACT).fingerprint()
    same = [
        ("objectives.cost.weight", -3),
        ("objectives.cost.ceiling", 0.5),
        ("training.seed", 7),
        ("services.mlflow", "http://mlflow"),
        ("logs.decisions", "elsewhere"),
    ]
    other = [
        ("state.window", 29),
        ("state.measures.games.aggregate", "mean"),
        ("action.dimensions.bonus.high", 49),
        ("objectives.ltv.discount", 0.5),
        ("policies", ["stretch", "spend", "retain"]),
    ]
    assert {load(tmp_path, changed(path, value)).fingerprint() for path, value in same} == {first}
    fingerprints = {load(tmp_path, changed(path, value)).fingerprint() for path, value in other}
    assert len(fingerprints) == len(other)
    assert first not in fingerprints


@given(st.integers(1, 10_000), st.sampled_from("smhdw"))
def test_durations_are_written_as_they_are_read(number: int, unit: str) -> None:
    duration = parse_duration(f"{number}{unit}")
    assert isinstance(duration, timedelta)
    assert parse_duration(format_duration(duration)) == duration


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3),
)


@given(
    st.sampled_from(
        [
            "version",
            "platform",
            "logs",
            "logs.decisions",
            "state",
            "state.period",
            "state.measures",
            "state.measures.games",
            "policies",
            "action",
            "action.dimensions",
            "action.dimensions.bonus",
            "action.default",
            "objectives",
            "objectives.cost",
            "serving.holdout",
            "services",
        ]
    ),
    values,
)
def test_any_value_anywhere_is_read_or_refused_in_words(path: str, value: object) -> None:
    with contextlib.suppress(ConfigurationError):
        platform_from_tree(changed(path, copy.deepcopy(value)), Path(), "fastq.yaml")


@given(
    st.lists(
        st.sampled_from([("state.window", "many"), ("policies", []), ("objectives.cost.weight", float("inf")), ("logs.decisions", 5)]),
        unique_by=lambda mistake: mistake[0],
        min_size=1,
    )
)
def test_each_line_of_a_refusal_names_the_file(mistakes: list[tuple[str, object]]) -> None:
    tree: dict[str, Any] = yaml.safe_load(CONTRACT)
    for path, value in mistakes:
        branch, _, key = path.rpartition(".")
        here = tree
        for step in filter(None, branch.split(".")):
            here = here[step]
        here[key] = value
    with pytest.raises(ConfigurationError) as error:
        platform_from_tree(tree, Path(), "fastq.yaml")
    lines = str(error.value).splitlines()
    assert sorted(line.split(": ")[1] for line in lines) == sorted(path for path, _ in mistakes)


def test_a_periods_number_keeps_to_the_bounds_of_its_events_as_far_as_its_aggregate_does() -> None:
    """Three events between the bounds, added up and so on, never leave what `of_a_period` says; and it is no wider than it must be."""
    inf = float("inf")
    for low, high in ((0.0, 1.0), (1.0, 5.0), (-2.0, 3.0), (-3.0, -1.0), (None, 2.0), (0.5, None), (None, None)):
        given = {"min": low, "max": high}
        plain = (-inf if low is None else low, inf if high is None else high)
        for aggregate in ("mean", "min", "max", "last"):
            assert Measure(aggregate=aggregate, **given).of_a_period == plain
        assert Measure(aggregate="count", **given).of_a_period == (0, inf)
        total = Measure(aggregate="sum", **given).of_a_period
        for events in (1, 3):
            assert total[0] <= events * plain[0] <= events * plain[1] <= total[1]
        assert total == (plain[0] if plain[0] >= 0 else -inf, plain[1] if plain[1] <= 0 else inf)
