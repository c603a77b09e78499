"""Explanations of everybody are those of each: same numbers, taken up where a run was stopped, clear about what cannot be asked."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastq import explanation
from fastq.errors import ConfigurationError, RequestError, UnknownPlayerError
from fastq.platform import Platform, load_platform
from feature_repo import store
from serving import explain_all as bulk
from serving import online


@pytest.fixture(scope="module")
def platform(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    return load_platform(shutil.copytree(trained, tmp_path_factory.mktemp("bulk") / "workspace"))


@pytest.fixture(scope="module")
def everybody(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, pl.DataFrame]:
    out = tmp_path_factory.mktemp("out") / "why.parquet"
    said = bulk.explain_all(platform, out, "retain", attributions=True)
    return said, pl.read_parquet(out)


def test_each_row_is_the_single_explanation_of_its_player(platform: Platform, everybody: tuple[dict, pl.DataFrame]) -> None:
    said, frame = everybody
    assert frame["player_id"].to_list() == store.known_players(platform)["player_id"].to_list()
    with online.open_service(platform) as service:
        model = service.current()
        for row in frame.sample(12, seed=1).iter_rows(named=True):
            states = online.read_states(service, model, [row["player_id"]], datetime.fromisoformat(said["at"])).states
            alone = explanation.as_dict(explanation.explain(model.policy, states, against="retain"))
            assert [row[name] for name in platform.dimension_names] == pytest.approx(list(alone["action"].values()), rel=1e-5)
            assert [row[n] for n in ("value", "low", "high")] == pytest.approx([alone[n] for n in ("value", "low", "high")], rel=1e-5, abs=1e-5)
            for prefix, parts in (("part", alone["parts"]), ("difference", alone["contrast"]["parts"])):
                for part in parts:
                    assert row[f"{prefix}_{part['objective']}_{part['horizon']}"] == pytest.approx(part["value"], rel=1e-5, abs=1e-5)
            assert row["difference"] == pytest.approx(alone["contrast"]["difference"], rel=1e-5, abs=1e-5)
            assert row["decisive"] == [" ".join(reason) for reason in alone["contrast"]["decisive"]]
            assert row["policies"] == alone["evidence"]["policies"]
            for name, moved in alone["attributions"]["measures"].items():
                assert row[f"moved_{name}"] == pytest.approx(moved, rel=1e-3, abs=1e-4)  # a path's pieces are cut by thresholds, which floats may cross


def test_the_parts_of_everybody_add_up(platform: Platform, everybody: tuple[dict, pl.DataFrame]) -> None:
    frame = everybody[1]
    for total, prefix in (("value", "part_"), ("difference", "difference_")):
        parts = frame.select(pl.sum_horizontal(pl.col(f"{prefix}{o}_{h}") for o in platform.objectives for h in explanation.HORIZONS)).to_series()
        np.testing.assert_allclose(parts, frame[total], rtol=1e-9, atol=1e-9)


def test_a_run_that_was_stopped_is_taken_up_and_gives_the_same(platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "CHUNK", 64)
    out, done = tmp_path / "why.parquet", []

    def stop(now: int, of: int) -> None:
        done.append(now)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bulk.explain_all(platform, out, "spend", on_progress=stop)
    assert not out.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".why.parquet.partial").glob("*.parquet")}
    assert len(kept) == 2
    calls = []
    rows = bulk.rows
    monkeypatch.setattr(bulk, "rows", lambda *a, **k: calls.append(1) or rows(*a, **k))
    said = bulk.explain_all(platform, out, "spend")
    assert said["resumed"]
    assert len(calls) == -(-said["players"] // 64) - 2
    assert not list(tmp_path.glob(".*"))
    frame = pl.read_parquet(out)
    assert frame["player_id"].is_unique().all()
    assert len(frame) == said["players"]
    again = bulk.explain_all(platform, out, "retain")  # another question starts anew
    assert not again["resumed"]
    assert not pl.read_parquet(out)["difference"].equals(frame["difference"])


def test_other_formats_and_what_cannot_be_asked(platform: Platform, tmp_path: Path) -> None:
    bulk.explain_all(platform, tmp_path / "why.csv", None)
    assert "difference" not in (frame := pl.read_csv(tmp_path / "why.csv")).columns
    assert len(frame) == len(store.known_players(platform))
    for against, error in (("logged", RequestError), ("nobody", RequestError), ("model:99", UnknownPlayerError)):
        with pytest.raises(error):
            bulk.explain_all(platform, tmp_path / "why.parquet", against)
    with pytest.raises(ConfigurationError, match=r"\.parquet"):
        bulk.explain_all(platform, tmp_path / "why.xlsx")
