"""A platform file from somebody's logs: it loads, the logs pass under it, and every guess says why."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from fastq.errors import ConfigurationError
from fastq.inference import infer_platform_file
from fastq.platform import CatalogueAction, ContinuousAction, Platform, load_platform
from fastq.records import read_records

START = datetime(2026, 3, 1, 5, tzinfo=UTC)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    return tmp_path


def written(directory: Path, *arguments: str, **options: object) -> tuple[str, Platform]:
    text = infer_platform_file(directory, *arguments, **options)  # type: ignore[arg-type]
    (directory / "fastq.yaml").write_text(text, encoding="utf-8")
    return text, load_platform(directory)


def decisions(players: int = 20, days: int = 12, gap: timedelta = timedelta(days=1)) -> pl.DataFrame:
    """Neutral names: only the numbers can tell `alpha` and `beta` (actions) from `happy` (unknown on the last two days)."""
    r, n = np.random.default_rng(0), players * days
    return pl.DataFrame(
        {
            "decision_id": range(n),
            "player_id": [f"p{i % players}" for i in range(n)],
            "decided_at": [START + gap * (i // players) for i in range(n)],
            "policy": ["bold" if i % 3 else "careful" for i in range(n)],
            "alpha": np.clip(r.normal(8, 5, n), 0, 15),
            "beta": r.integers(0, 9, n) * 5,
            "happy": [float(i % 7) if i // players < days - 2 else None for i in range(n)],
            "unit_cost": [0.1 * (i % 4) if i // players < days - 2 else None for i in range(n)],
        }
    )


def line(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(f"{name}:"))


def test_actions_objectives_bounds_policies_and_period_are_found_and_the_logs_pass(here: Path) -> None:
    decisions().write_parquet(here / "logs/d.parquet")
    text, platform = written(here, "logs/*.parquet")
    assert isinstance(platform.action, ContinuousAction)
    assert {name: (d.low, d.high, d.step) for name, d in platform.action.dimensions.items()} == {"alpha": (0, 15, None), "beta": (0, 40, 5)}
    assert {name: o.weight for name, o in platform.objectives.items()} == {"happy": 1.0, "unit_cost": -1.0}
    assert platform.objectives["happy"].known_after == timedelta(days=2)  # known on day 9, not on day 11
    assert platform.policies == ["bold", "careful"]
    assert (platform.state.period, platform.state.window, platform.assignment) == (timedelta(days=1), 5, "decision")
    assert platform.platform.startswith("test_actions")
    for name in ("alpha", "beta", "happy", "unit_cost", "period", "window", "churn", "assignment", "platform"):
        assert "# guess: " in line(text, name), name
    assert read_records(platform).counts["decisions"].quarantined == 0


def test_paths_are_taken_from_the_current_directory_and_written_relative_to_the_workspace(here: Path) -> None:
    decisions().write_csv(here / "logs/d.csv")
    (here / "deep/er").mkdir(parents=True)
    for source in ("logs/*.csv", str(here / "logs/*.csv")):
        _, platform = written(here / "deep/er", source)
        assert platform.logs.decisions == "../../logs/*.csv"
        assert read_records(platform).counts["decisions"].accepted == 240


def test_what_is_named_is_no_guess_and_what_is_not_named_is_left_to_the_other_side(here: Path) -> None:
    decisions().drop_nulls().write_parquet(here / "logs/d.parquet")  # nothing tells happy from an action now
    _, platform = written(here, "logs/d.parquet", actions=["beta"])
    assert (platform.dimension_names, list(platform.objectives)) == (["beta"], ["alpha", "happy", "unit_cost"])
    _, platform = written(here, "logs/d.parquet", objectives=["happy"])
    assert (platform.dimension_names, list(platform.objectives)) == (["alpha", "beta", "unit_cost"], ["happy"])
    _, platform = written(here, "logs/d.parquet", actions=["alpha"], objectives=["happy"])
    assert (platform.dimension_names, list(platform.objectives)) == (["alpha"], ["happy"])


def test_columns_that_the_proposals_have_are_actions(here: Path) -> None:
    frame = decisions().drop_nulls().rename({"happy": "cost_limit"})  # its name says objective, the proposals say action
    frame.write_parquet(here / "logs/d.parquet")
    frame.select("decision_id", "policy", "alpha", "beta", pl.col("cost_limit") + 10).write_parquet(here / "logs/p.parquet")
    text, platform = written(here, "logs/d.parquet", proposals="logs/p.parquet")
    assert platform.dimension_names == ["alpha", "beta", "cost_limit"]
    assert "the proposals have it too" in line(text, "cost_limit")
    assert platform.bounds[2].tolist() == [0, 16]  # theirs reach further than what was done
    assert platform.logs.proposals == "logs/p.parquet"


def test_measures_and_attributes_are_guessed_from_names_and_numbers(here: Path) -> None:
    decisions().write_parquet(here / "logs/d.parquet")
    n = 60
    events = {
        "player_id": ["p1"] * n,
        "occurred_at": ["2026-03-01T06:00:00Z"] * n,
        "games": range(n),
        "win_rate": [0.5] * n,
        "heat": [i - 30.0 for i in range(n)],
        "happy": [1.0] * n,
        "note": ["x"] * n,
    }
    pl.DataFrame(events).write_ndjson(here / "logs/a.ndjson")
    people = {
        "player_id": [f"p{i}" for i in range(n)],
        "age": range(n),
        "channel": ["ads", "friend"] * 30,
        "email": [f"{i}@example.org" for i in range(n)],
        "joined": ["2026-01-01"] * n,
    }
    pl.DataFrame(people).write_csv(here / "logs/p.csv")
    text, platform = written(here, "logs/d.parquet", activity="logs/a.ndjson", players="logs/p.csv")
    measures = {name: (m.aggregate, m.min, m.max) for name, m in platform.state.measures.items()}
    assert measures == {"games": ("sum", 0, None), "win_rate": ("mean", 0, 1), "heat": ("mean", None, None)}
    assert "# left out: happy is also a column of the decisions" in text
    assert {name: a.kind for name, a in platform.state.attributes.items()} == {"age": "numeric", "channel": "categorical"}
    assert "# left out: email" in text
    assert "# left out: joined" in text
    assert read_records(platform).quarantine.is_empty()


def test_a_column_with_a_name_that_is_taken_is_left_out_and_said(here: Path) -> None:
    decisions().with_columns(row=1.0).write_parquet(here / "logs/d.parquet")
    pl.DataFrame({"player_id": ["p1"], "occurred_at": [START], "games": [1.0], "counts": [2.0]}).write_parquet(here / "logs/a.parquet")
    text, platform = written(here, "logs/d.parquet", activity="logs/a.parquet")
    assert list(platform.state.measures) == ["games"]
    assert "# left out: row: fastq keeps this name" in text
    assert "# left out: counts: fastq keeps this name" in text
    assert "left out: policy" not in text


def test_a_catalogue_of_rounds_without_any_activity_is_one_step_long(here: Path) -> None:
    n = 50
    rounds = {
        "decision_id": range(n),
        "player_id": range(n),
        "decided_at": [START] * n,
        "policy": ["random", "bts"] * 25,
        "item_id": [i % 5 for i in range(n)],
        "click": [i % 2 for i in range(n)],
    }
    pl.DataFrame(rounds).with_columns(propensity=0.2).write_csv(here / "logs/rounds.csv")
    pl.DataFrame({"item_id": range(5), "price": [1.5] * 5, "brand": ["a"] * 5}).write_csv(here / "logs/items.csv")
    _, platform = written(here, "logs/rounds.csv", items="logs/items.csv")
    assert isinstance(platform.action, CatalogueAction)
    assert {name: f.kind for name, f in platform.action.features.items()} == {"price": "numeric", "brand": "categorical"}
    assert platform.objectives["click"].discount == 0
    assert (platform.state.window, platform.state.measures) == (1, {})
    assert read_records(platform).counts["decisions"].accepted == n


@pytest.mark.parametrize(
    ("gap", "period"), [(timedelta(hours=5), timedelta(hours=6)), (timedelta(minutes=50), timedelta(hours=1)), (timedelta(days=8), timedelta(weeks=1))]
)
def test_the_period_is_the_grid_nearest_to_the_gaps(here: Path, gap: timedelta, period: timedelta) -> None:
    decisions(gap=gap).write_parquet(here / "logs/d.parquet")
    assert written(here, "logs/d.parquet")[1].state.period == period


def test_a_policy_that_sticks_to_its_players_is_seen(here: Path) -> None:
    decisions().with_columns(policy=pl.when(pl.col("player_id") < "p2").then(pl.lit("yes")).otherwise(pl.lit("a: #b"))).write_parquet(here / "logs/d.parquet")
    text, platform = written(here, "logs/d.parquet")
    assert platform.assignment == "player"
    assert platform.policies == ["yes", "a: #b"]  # quoted where YAML needs it: neither a boolean nor a comment
    assert yaml.safe_load(text)["policies"] == ["yes", "a: #b"]
    decisions().with_columns(policy=pl.when(pl.col("player_id") < "p2").then(pl.lit("yes")).otherwise("policy")).write_parquet(here / "logs/d.parquet")
    assert written(here, "logs/d.parquet")[1].assignment == "decision"  # most players meet both


def test_bounds_on_which_nothing_piles_up_are_rounded_outwards(here: Path) -> None:
    values = np.linspace(1.234, 98.7, 240)
    decisions().with_columns(alpha=values).write_parquet(here / "logs/d.parquet")
    text, platform = written(here, "logs/d.parquet")
    assert platform.bounds[0].tolist() == [1, 99]
    assert "values from 1.234 to 98.7, rounded outwards" in line(text, "alpha")


def test_ends_on_which_actions_pile_up_are_the_bounds(here: Path) -> None:
    decisions().with_columns(pl.col("alpha").clip(0.37, 14.83)).write_parquet(here / "logs/d.parquet")
    text, platform = written(here, "logs/d.parquet")
    assert platform.bounds[0].tolist() == [0.37, 14.83]
    assert "bounds on which several actions lie" in line(text, "alpha")


def test_odd_columns_do_not_get_in_the_way(here: Path) -> None:
    odd = decisions().with_columns(tags=pl.lit([1, 2]), empty=pl.lit(None), constant=pl.lit(3.0))
    odd.with_columns(
        pl.col("alpha").cast(pl.String), pl.when(pl.int_range(pl.len()) == 5).then(pl.lit(float("nan"))).otherwise("happy").alias("happy")
    ).write_parquet(here / "logs/d.parquet")
    _, platform = written(here, "logs/d.parquet", actions=["alpha", "constant"], objectives=["happy"])
    assert platform.bounds.tolist() == [[0, 15], [3, 4]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"decisions": "logs/gone.csv"}, "--decisions: no such file: logs/gone.csv"),
        ({"players": "logs/gone-*.csv"}, "--players: no file matches"),
        ({"actions": ["alfa"]}, "--action alfa: no column of numbers of that name in logs/d.parquet; did you mean 'alpha'?"),
        ({"objectives": ["policy"]}, "--objective policy: no column of numbers"),
        ({"actions": ["alpha"], "objectives": ["alpha"]}, "alpha cannot be both"),
        ({"actions": ["alpha", "beta", "happy", "unit_cost"], "objectives": []}, "no column looks like an objective; name them with --objective"),
        ({"objectives": ["alpha", "beta", "happy", "unit_cost"]}, "no column looks like an action; name them with --action"),
        ({"activity": "logs/d.parquet"}, "--activity: logs/d.parquet: column 'occurred_at' is missing"),
        ({"items": "logs/d.parquet"}, "column 'item_id' is missing"),
    ],
)
def test_what_cannot_be_guessed_is_asked_for_by_name(here: Path, options: dict[str, object], says: str) -> None:
    decisions().write_parquet(here / "logs/d.parquet")
    with pytest.raises(ConfigurationError) as error:
        infer_platform_file(here, **{"decisions": "logs/d.parquet", **options})  # type: ignore[arg-type]
    assert says in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (
            decisions().rename({"decided_at": "decision_time"}),
            "column 'decided_at' is missing, and every log of decisions has it; rename a column: perhaps 'decision_time' is meant?",
        ),
        (decisions().with_columns(decided_at=pl.lit("soon")), "column 'decided_at' of type String holds nothing that can be read as a timestamp"),
        (decisions().with_columns(policy=pl.lit(None, pl.String)), "column 'policy' of type String holds nothing"),
        (decisions().with_columns(policy=pl.lit("fastq")), "names no behaviour policy"),
        (decisions().head(0), "holds no rows"),
    ],
)
def test_logs_that_say_too_little_are_named(here: Path, frame: pl.DataFrame, says: str) -> None:
    frame.write_parquet(here / "logs/d.parquet")
    with pytest.raises(ConfigurationError, match=r"logs/d\.parquet") as error:
        infer_platform_file(here, "logs/d.parquet")
    assert says in str(error.value)
