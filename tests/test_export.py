"""What another runtime answers is what we answer: raw windows of a real log, limits, grids, eligible items, batches of any size."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from fastq import cli, export, features, learner, records, registry, windows, worlds
from fastq.errors import BundleError, ConfigurationError
from fastq.features import PlayerStates
from fastq.platform import load_platform, platform_from_tree


def learned(platform, read):
    torch.set_num_threads(1)
    data = windows.build(platform, read, features.build_rows(platform, read))
    return learner.train(platform, data), data


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    """A small simulated platform, one dimension on a grid, trained for two epochs and written out by the command; with its policy and transitions."""
    root = tmp_path_factory.mktemp("arena")
    worlds.write_logs(worlds.world("arena"), root, players=80, days=12, seed=3)
    tree = yaml.safe_load((root / "fastq.yaml").read_text())
    tree["training"] = {"epochs": 2}
    tree["action"]["dimensions"]["target_games"]["step"] = 1
    (root / "fastq.yaml").write_text(yaml.safe_dump(tree))
    platform = load_platform(root)
    policy, data = learned(platform, records.read_records(platform))
    policy.save(root / "bundle")
    with registry.start_run(platform, "test", {}) as run:
        registry.promote(platform, registry.register(platform, run.id, root / "bundle"), reason="test", forced=True)
    return root, policy, data


@pytest.fixture(scope="module")
def written(arena, fastq):
    """The directory that `fastq export` wrote, and its JSON answer."""
    root, *_ = arena
    done = fastq("export", "--out", root / "elsewhere", "--json", cwd=root, code=0)
    return root / "elsewhere", json.loads(done.stdout)


def as_inputs(policy, states):
    """States as model.json describes them; what a team that serves elsewhere would write."""
    inputs = {"history": states.history, "actions": states.actions, "objectives": states.objectives}
    inputs["last_policy"] = np.array([-1 if name is None else policy.policies.index(name) for name in states.policies])
    if policy.encoding.numeric:
        inputs["numeric"] = states.attributes.select(list(policy.encoding.numeric)).to_numpy().astype(float)
    values = policy.encoding.vocabularies
    codes = [[1 + values[n].index(v) if v in values[n] else 0 for v in states.attributes[n].cast(pl.String)] for n in values]
    return inputs | ({"categorical": np.array(codes, np.int64).T.reshape(len(states), -1)} if codes else {})


def limits(policy, n, **narrowed):
    low, high = (np.tile(edge, (n, 1)) for edge in policy.platform.bounds.T)
    for name, (least, most) in narrowed.items():
        at = policy.platform.dimension_names.index(name)
        low[:, at], high[:, at] = least, most
    return {"low": low, "high": high}


def test_the_command_says_what_it_wrote_and_how_near_the_other_runtime_came(written):
    directory, document = written
    assert {path.name for path in directory.iterdir()} == set(document["files"])
    assert 0 < document["parity"]["largest_difference"] < 1e-5
    assert document["model_version"] == "1"


def test_windows_of_a_log_get_the_same_actions_and_parts(arena, written):
    _, policy, data = arena
    directory, _ = written
    states = data.states(np.arange(0, len(data), 3))
    found = export.answers(directory / "recommend.onnx", as_inputs(policy, states) | limits(policy, len(states)))
    expected = export.our_recommendations(policy, states)
    assert export.apart(found, expected, policy).max() < 1e-5
    assert (np.abs(found["action"] - expected["action"]).max(1) < 1e-5).mean() > 0.99  # the rest are ties, whose totals agree
    np.testing.assert_allclose(found["parts"].sum((1, 2)), found["value"], rtol=1e-12, atol=1e-12)
    assert np.ptp(found["action"], axis=0).min() > 0.1, "states differ, and so do actions"


@pytest.mark.parametrize("narrow", [{"bonus": (0.0, 5.0)}, {"target_games": (3.4, 6.9), "nudges": (1.0, 1.0)}])
def test_limits_are_kept_as_we_keep_them(arena, written, narrow):
    _, policy, data = arena
    states = data.states(np.arange(60))
    found = export.answers(written[0] / "recommend.onnx", as_inputs(policy, states) | limits(policy, 60, **narrow))
    ours = policy.recommend(states, explore=False, limits={name: {"low": low, "high": high} for name, (low, high) in narrow.items()})
    near = np.abs(found["action"] - ours.action).max(1) < 1e-5
    assert near.mean() > 0.95
    np.testing.assert_allclose(found["value"][near], ours.value[near], rtol=1e-5, atol=1e-5)


def test_one_state_alone_and_fewer_periods_than_the_window(arena, written):
    _, policy, data = arena
    window = policy.platform.state.window
    index = np.flatnonzero(~np.isfinite(data.raw(np.arange(len(data)))).any(2)[:, :-3].any(1))[:5]  # of whom only the newest periods are known
    assert len(index) == 5
    states = data.states(index)
    assert window > 3
    inputs = as_inputs(policy, states)
    short = {name: value[:, -3:] if name in ("history", "actions", "objectives") else value for name, value in inputs.items()}
    expected = export.our_recommendations(policy, states)
    assert export.apart(export.answers(written[0] / "recommend.onnx", short | limits(policy, 5)), expected, policy).max() < 1e-5
    alone = {name: value[:1] for name, value in (inputs | limits(policy, 5)).items()}
    first = {name: value[:1] for name, value in expected.items()}
    assert export.apart(export.answers(written[0] / "recommend.onnx", alone), first, policy).max() < 1e-5


def test_actions_that_the_caller_names_are_scored(arena, written):
    _, policy, data = arena
    states = data.states(np.arange(40))
    candidates = np.random.default_rng(0).uniform(*policy.platform.bounds.T, (40, 7, 3))
    found = export.answers(written[0] / "score.onnx", as_inputs(policy, states) | {"candidates": candidates})
    np.testing.assert_allclose(found["by_objective"], policy.parts(policy.encode(states), candidates).sum(-1), rtol=1e-5, atol=1e-5)
    assert export.apart(found, export.our_scores(policy, states, candidates), policy).max() < 1e-5


def test_the_description_and_the_example_suffice_to_check_a_port(arena, written):
    directory, _ = written
    described = json.loads((directory / "model.json").read_text())
    example = json.loads((directory / "example.json").read_text())
    for name, graph in described["graphs"].items():
        given = {key: np.array(example[name]["inputs"][key], entry["dtype"]) for key, entry in graph["inputs"].items()}
        found = export.answers(directory / graph["file"], given)
        for key, entry in graph["outputs"].items():
            expected = np.array(example[name]["outputs"][key], entry["dtype"])
            assert found[key].dtype == expected.dtype
            assert found[key].ndim == len(entry["shape"])
            np.testing.assert_allclose(found[key], expected, rtol=1e-5, atol=1e-5)
    assert described["law"]["sd"] == pytest.approx(0.05 * np.ptp(arena[1].platform.bounds, axis=1))


def test_a_graph_that_answers_otherwise_is_not_left_behind(arena, monkeypatch, tmp_path):
    _, policy, _ = arena
    monkeypatch.setattr(export, "write_graph", lambda *_: None)
    monkeypatch.setattr(export, "answers", lambda path, given: export.our_recommendations(replace(policy, effects=policy.effects * 1.01), states))
    states, _ = export.example_states(policy, export.CHECKED)
    with pytest.raises(BundleError, match="onnxruntime answers otherwise"):
        export.export_onnx(policy, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_axis_that_stays_open_is_never_one_long_in_the_example():
    assert export.openable(np.zeros((5, 1, 1)), ["batch", "periods", 1]).shape == (5, 2, 1)
    assert export.openable(np.zeros((5, 3)), ["batch", "candidates"]).shape == (5, 3)


def test_what_is_missing_is_named_with_the_mend(arena, monkeypatch, tmp_path):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"onnxruntime is not installed; pip install 'fastq\[onnx\]'"):
        export.export_onnx(arena[1], tmp_path)


def test_a_catalogue_larger_than_what_is_re_ranked(tmp_path):
    """Ranking, law and eligible items, few and many."""
    rng, count, players, days = np.random.default_rng(0), 600, 60, 4
    n = players * days
    items = pl.DataFrame({"item_id": [f"a{k}" for k in range(count)], "price": rng.uniform(1, 8, count), "brand": rng.choice(list("xyz"), count)})
    shown = rng.integers(0, count, n)
    decisions = pl.DataFrame(
        {
            "decision_id": [f"d{i}" for i in range(n)],
            "player_id": [f"p{i}" for i in np.repeat(np.arange(players), days)],
            "decided_at": [datetime(2026, 1, 1, 6, tzinfo=UTC) + timedelta(days=int(k)) for k in np.tile(np.arange(days), players)],
            "policy": rng.choice(["a", "b"], n),
            "propensity": np.full(n, 1 / count),
            "assignment": np.full(n, 0.5),
            "model_version": pl.Series([None] * n, dtype=pl.String),
            "item_id": [f"a{k}" for k in shown],
            "click": (items["price"].to_numpy()[shown] < 4) + rng.normal(0, 0.1, n),
        }
    )
    tree = {
        "platform": "bazaar",
        "logs": {"decisions": "d.parquet", "items": "i.parquet"},
        "state": {"window": 3},
        "policies": ["a", "b"],
        "action": {"kind": "catalogue", "features": {"price": {"kind": "numeric"}, "brand": {"kind": "categorical"}}},
        "objectives": {"click": {"discount": 0}},
        "training": {"epochs": 1},
    }
    read = records.Records(decisions, None, None, None, items, pl.DataFrame(), {"decisions": records.Counts(n, 0, 0)}, {}, [])
    policy, data = learned(platform_from_tree(tree, Path(), "test"), read)
    export.export_onnx(policy, tmp_path)
    described = json.loads((tmp_path / "model.json").read_text())
    states = data.states(np.arange(50))
    last = np.array([-1 if name is None else policy.policies.index(name) for name in states.policies])
    where = {tuple(vector): k for k, vector in enumerate(policy.catalogue.embedding.astype(np.float32))}
    positions = np.array([[where.get(tuple(v), -1) for v in row] for row in states.actions], np.int64)
    assert (positions >= 0).any() and (positions < 0).any()
    given = {"history": states.history.astype(np.float32), "actions": positions, "objectives": states.objectives, "last_policy": last}
    for eligible in (None, [f"a{k}" for k in range(0, 600, 150)]):
        mask = np.ones((50, count), bool) if eligible is None else np.tile(np.isin(described["items"], eligible), (50, 1))
        found = export.answers(tmp_path / "recommend.onnx", given | {"eligible": mask})
        ours = policy.recommend(states, explore=False, eligible=eligible, top_k=4)
        ranking = np.array(described["items"])[found["ranking"][:, :4]]
        assert (ranking == np.array(ours.ranking)).all(1).mean() > 0.95  # the rest are ties
        np.testing.assert_allclose(found["value"], ours.value, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found["law"].sum(1), 1, rtol=1e-9)
        total, _ = policy.item_scores(policy.situations(policy.encode(states)), policy.platform.weights, eligible)
        law = policy.item_law(total, policy.situations(policy.encode(states)), policy.platform.serving.exploration).numpy()
        np.testing.assert_allclose(np.sort(found["law"], 1)[:, -law.shape[1] :], np.sort(law, 1), rtol=1e-5, atol=1e-7)
        if eligible is not None:
            assert (found["ranking"][:, 4:] == -1).all()
    scored = export.answers(tmp_path / "score.onnx", given | {"candidates": np.tile(np.arange(5), (50, 1))})
    expected = export.our_scores(policy, PlayerStates(states.history, None, states.actions, states.objectives, states.policies), np.tile(np.arange(5), (50, 1)))
    assert export.apart(scored, expected, policy).max() < 1e-5


def test_an_out_that_is_a_file_is_refused_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "fastq.yaml").write_text(
        "platform: a\nlogs: {decisions: d.csv}\nstate: {}\npolicies: [a]\naction: {kind: continuous, dimensions: {x: {low: 0, high: 1}}}\nobjectives: {y: {}}\n"
    )
    with pytest.raises(ConfigurationError, match="expected a directory"):
        cli.export(tmp_path / "file", None, cli.ExportFormat.onnx, tmp_path, as_json=False)
