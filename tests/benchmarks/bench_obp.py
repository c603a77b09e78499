"""Accuracy beside the Open Bandit Pipeline's estimators (obp 0.4.1), both on the same arrays: `make bench-obp`.

Bar: the mean relative estimation error, |estimate - truth| / truth, of our best estimator is at most 1.05 times that of OBP's best, over the same runs.

- synthetic: OBP's own world, 10,000 rounds, 30 actions, 5 features, binary rewards; the target learned by its IPWLearner on another log. The logger is its
  linear policy to the power -3, as in the README of a later version that states 0.0062 for doubly robust (`sharp`), or as
  it is, with a target that is deterministic (`deterministic`). Truth: the target's expected reward in the very rounds of the log.
- open bandit: bootstrap samples of the small log of the uniform policy, truth the mean click of `bts` in its own log (42 clicks: it is itself uncertain by
  15 %, so only the comparison says something); the target's law by 100,000 draws from the prior that OBP ships.

Three columns: OBP with its regression model (logistic, 3 folds, settings of its examples); our estimators on that same model's values; ours with our own model
(`fitted_q`, ridge) on the same features. SWITCH and DRos are tuned in ours; 0.4.1 does not tune, and gets the pairs of its examples.

FASTQ_BENCH_OBP names a folder to install OBP into (without its dependencies, at the end of the path, so that nothing of ours is replaced); by default one among
the system's temporary files. FASTQ_BENCH_RUNS: runs per setting.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import LabelEncoder, OneHotEncoder

from fastq import ope

VERSION, DEPENDENCIES = "obp==0.4.1", ("seaborn==0.13.2",)
SCOPE_RL = "scope-rl==0.2.1"
SCOPE_RL_DEPENDENCIES = (  # in versions that run beside ours
    *("d3rlpy==2.8.1", "gymnasium==1.0.0", "gym==0.26.2", "gym-notices==0.1.0", "farama-notifications==0.0.6", "seaborn==0.13.2", "pytorch-revgrad==0.2.0"),
    *("structlog==26.1.0", "dataclasses-json==0.6.7", "marshmallow==4.4.0", "typing-inspect==0.9.0", "mypy-extensions==1.2.0", "h5py==3.16.0"),
    *("hydra-core==1.3.8", "omegaconf==2.4.0", "antlr4-python3-runtime==4.13.2", "colorama==0.4.6"),
)
RUNS = int(os.environ.get("FASTQ_BENCH_RUNS", "20"))
ROUNDS, ACTIONS, CONTEXT = 10_000, 30, 5
LARGEST_RATIO = 1.05
DRAWS = 100_000  # of OBP's Thompson sampling, to know its probabilities


@dataclass(frozen=True)
class Log:
    """One run. feedback: OBP's record; action_dist, modelled [N, K, positions]: the target's law and OBP's values; truth: the target's value.

    For our model: state [N, S]; logged, target [N, F]: features of the logged action, and in expectation under the target.
    """

    feedback: dict
    action_dist: np.ndarray
    modelled: np.ndarray
    truth: float
    state: np.ndarray
    logged: np.ndarray
    target: np.ndarray


def on_path(site: Path, package: str, *wanted: str) -> None:
    """Install what is wanted into a folder, unless `package` is there, and put it at the end of the path."""
    if not (site / package).exists():
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(site)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *wanted], check=True)
    sys.path.append(str(site))
    warnings.simplefilter("ignore")


@pytest.fixture(scope="module")
def obp():
    """OBP's parts, installed where nothing else is."""
    site = Path(os.environ.get("FASTQ_BENCH_OBP") or Path(tempfile.gettempdir()) / f"fastq-{VERSION.replace('==', '-')}")
    on_path(site, "obp", VERSION, *DEPENDENCIES)
    try:
        import obp.dataset as data
        import obp.ope as estimators
        import obp.policy as policies
        from obp.version import __version__

        assert f"obp=={__version__}" == VERSION
        yield SimpleNamespace(data=data, ope=estimators, policy=policies, site=site)
    finally:
        sys.path.remove(str(site))


def regression() -> LogisticRegression:
    return LogisticRegression(max_iter=10_000, C=100, random_state=12345)


def synthetic(obp, seed: int, *, sharp: bool) -> Log:
    linear = obp.data.linear_behavior_policy

    def logger(**arguments) -> np.ndarray:
        law = linear(**arguments)
        law = law**-3 if sharp else law
        return law / law.sum(1, keepdims=True)

    world = obp.data.SyntheticBanditDataset(
        n_actions=ACTIONS, dim_context=CONTEXT, reward_function=obp.data.logistic_reward_function, behavior_policy_function=logger, random_state=seed
    )
    policy = obp.policy.IPWLearner(n_actions=ACTIONS, base_classifier=regression())
    past, log = world.obtain_batch_bandit_feedback(n_rounds=ROUNDS), world.obtain_batch_bandit_feedback(n_rounds=ROUNDS)
    policy.fit(**{name: past[name] for name in ("context", "action", "reward", "pscore")})
    law = (policy.predict_proba if sharp else policy.predict)(context=log["context"])
    model = obp.ope.RegressionModel(n_actions=ACTIONS, action_context=world.action_context, base_model=regression())
    modelled = model.fit_predict(context=log["context"], action=log["action"], reward=log["reward"], n_folds=3, random_state=12345)
    state = np.column_stack([np.ones(ROUNDS), log["context"]])
    crossed = [(which[:, :, None] * state[:, None, :]).reshape(ROUNDS, -1) for which in (np.eye(ACTIONS)[log["action"]], law[:, :, 0])]
    return Log(log, law, modelled, world.calc_ground_truth_policy_value(log["expected_reward"], law), state, *crossed)


@pytest.fixture(scope="module")
def shop(obp) -> SimpleNamespace:
    """The Open Bandit small logs as OBP prepares them; its own reader does not run with pandas 2."""
    root = obp.site / "obp" / "dataset" / "obd"
    random, bts = (pd.read_csv(root / name / "all" / "all.csv", index_col=0).sort_values("timestamp") for name in ("random", "bts"))
    items = pd.read_csv(root / "random" / "all" / "item_context.csv", index_col=0)
    groups = items[["item_feature_1", "item_feature_2", "item_feature_3"]]
    policy = obp.policy.BernoulliTS(n_actions=len(items), len_list=3, random_state=12345, is_zozotown_prior=True, campaign="all")
    return SimpleNamespace(
        log={
            "action": random["item_id"].to_numpy(),
            "reward": random["click"].to_numpy(),
            "pscore": random["propensity_score"].to_numpy(),
            "position": (rankdata(random["position"], "dense") - 1).astype(int),
            "context": pd.get_dummies(random.filter(regex="user_feature"), drop_first=True).to_numpy().astype(int),
        },
        items=np.column_stack([groups.apply(LabelEncoder().fit_transform), items["item_feature_0"]]),
        features=np.column_stack([items["item_feature_0"], OneHotEncoder(sparse_output=False).fit_transform(groups)]),
        law=policy.compute_batch_action_dist(n_sim=DRAWS)[0],
        truth=float(bts["click"].mean()),
    )


def open_bandit(obp, shop, seed: int) -> Log:
    n, k = len(shop.log["action"]), len(shop.items)
    drawn = np.random.RandomState(seed).choice(n, size=n)
    log = {name: column[drawn] for name, column in shop.log.items()} | {"n_rounds": n, "n_actions": k, "action_context": shop.items}
    model = obp.ope.RegressionModel(n_actions=k, len_list=3, action_context=shop.items, base_model=regression())
    modelled = model.fit_predict(**{name: log[name] for name in shop.log}, n_folds=3, random_state=12345)
    state = np.column_stack([np.ones(n), np.eye(3)[log["position"]][:, 1:], log["context"]])
    target = (shop.law.T @ shop.features)[log["position"]]
    return Log(log, np.broadcast_to(shop.law, (n, k, 3)), modelled, shop.truth, state, shop.features[log["action"]], target)


def theirs(obp, log: Log) -> dict[str, float]:
    estimators = [
        obp.ope.InverseProbabilityWeighting(),
        obp.ope.SelfNormalizedInverseProbabilityWeighting(),
        obp.ope.DirectMethod(),
        obp.ope.DoublyRobust(),
        obp.ope.SelfNormalizedDoublyRobust(),
        *(obp.ope.SwitchDoublyRobust(tau=each, estimator_name=f"switch-dr, {each}") for each in (1, 100)),
        *(obp.ope.DoublyRobustWithShrinkage(lambda_=each, estimator_name=f"dr-os, {each}") for each in (1, 100)),
    ]
    panel = obp.ope.OffPolicyEvaluation(bandit_feedback=log.feedback, ope_estimators=estimators)
    found = panel.estimate_policy_values(action_dist=log.action_dist, estimated_rewards_by_reg_model=log.modelled)
    return {name: float(value) for name, value in found.items()}


def ours(log: Log, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """On OBP's model; on ours."""
    action, rounds = log.feedback["action"], np.arange(len(log.state))
    position = np.zeros_like(action) if log.feedback["position"] is None else log.feedback["position"]
    pi, q = log.action_dist[rounds, :, position], log.modelled[rounds, :, position]
    reward, weights = log.feedback["reward"].astype(float)[:, None], ope.naive_weights(pi[rounds, action], log.feedback["pscore"])
    one_step = {"discount": np.zeros_like(reward), "following": np.full(len(rounds), -1), "truncated": np.zeros(len(rounds), bool), "player": rounds}
    x, wanted = np.hstack([log.state, log.logged]), np.hstack([log.state, log.target])
    fitted = ope.fitted_q(x, wanted, reward, **one_step, rng=np.random.default_rng(seed), free=1)
    default = ope.double_reinforcement(log.state, log.logged, log.target, reward, weights, **one_step, rng=np.random.default_rng(seed), free=1)
    assert isinstance(fitted, ope.FittedQ)
    assert isinstance(default, ope.DoubleReinforcement)

    def panel(q: np.ndarray, v: np.ndarray) -> dict[str, float]:
        terms = {
            "ipw": ope.inverse_propensity(reward, weights, rounds),
            "snipw": ope.self_normalised(reward, weights, rounds),
            "dm": ope.direct_method(v, rounds),
            "dr": ope.doubly_robust(reward, weights, q, v, rounds),
            "sndr": ope.self_normalised_doubly_robust(reward, weights, q, v, rounds),
            "switch-dr, tuned": ope.switch_doubly_robust(reward, weights, q, v, rounds),
            "dr-os, tuned": ope.shrunk_doubly_robust(reward, weights, q, v, rounds),
            "magic": ope.magic(reward, weights, q, v, **one_step, rng=np.random.default_rng(seed)),
        }
        return {name: float(each.values()[0]) for name, each in terms.items()}

    return panel(q[rounds, action], (pi * q).sum(1)), panel(fitted.q, fitted.v) | {"double reinforcement": float(default.terms.values()[0])}


@pytest.mark.parametrize("setting", ["sharp", "deterministic", "open bandit"])
def test_relative_error_beside_obp(obp, request, setting):
    columns = ("OBP", "ours on its model", "ours")
    errors: dict[tuple[str, str], list[float]] = {}
    for seed in range(RUNS):
        log = open_bandit(obp, request.getfixturevalue("shop"), seed) if setting == "open bandit" else synthetic(obp, seed, sharp=setting == "sharp")
        for column, found in zip(columns, (theirs(obp, log), *ours(log, seed)), strict=True):
            for name, value in found.items():
                errors.setdefault((name, column), []).append(abs(value - log.truth) / log.truth)
    table = pd.DataFrame(errors)
    mean, median = (table.agg(how).unstack().reindex(columns=list(columns)) for how in ("mean", "median"))
    print(
        f"\n{setting}: relative estimation error over {RUNS} runs, mean\n{mean.round(4).to_string(na_rep='')}\nmedian\n{median.round(4).to_string(na_rep='')}"
    )
    rival = table.xs("OBP", axis=1, level=1)
    rival = rival[rival.mean().idxmin()].rename("OBP: " + rival.mean().idxmin())
    own = table["double reinforcement", "ours"]
    mine = table.xs("ours", axis=1, level=1)
    mine = mine[mine.mean().idxmin()].rename(mine.mean().idxmin())
    drawn = np.random.default_rng(0).integers(RUNS, size=(10_000, RUNS))
    for label, challenger in ((f"our best, {mine.name}", mine), ("the platform's default, double reinforcement", own)):
        low, high = np.quantile(challenger.to_numpy()[drawn].mean(1) / rival.to_numpy()[drawn].mean(1), [0.025, 0.975])
        ratio, middle = challenger.mean() / rival.mean(), challenger.median() / rival.median()
        print(f"{label}, to {rival.name}: {ratio:.2f} of its mean error (95 % by resampled runs: {low:.2f} to {high:.2f}), {middle:.2f} of its median error")
    assert mine.mean() <= LARGEST_RATIO * rival.mean()


def test_the_constants_of_the_oracle(obp):
    """What tests/test_ope_oracle.py holds is what OBP says."""
    oracle = runpy.run_path(str(Path(__file__).parents[1] / "test_ope_oracle.py"))
    log = oracle["logged_rounds"]()
    feedback = {"n_rounds": len(log["action"]), "n_actions": log["pi"].shape[1], "position": None, "context": np.zeros((len(log["action"]), 1))}
    estimators = [
        obp.ope.InverseProbabilityWeighting(),
        obp.ope.SelfNormalizedInverseProbabilityWeighting(),
        obp.ope.DirectMethod(),
        obp.ope.DoublyRobust(),
        obp.ope.SelfNormalizedDoublyRobust(),
        obp.ope.SwitchDoublyRobust(tau=oracle["TAU"]),
        obp.ope.DoublyRobustWithShrinkage(lambda_=oracle["SHRINKAGE"]),
    ]
    panel = obp.ope.OffPolicyEvaluation(bandit_feedback=feedback | {name: log[name] for name in ("action", "reward", "pscore")}, ope_estimators=estimators)
    found = panel.estimate_policy_values(action_dist=log["pi"][:, :, None], estimated_rewards_by_reg_model=log["q"][:, :, None])
    print({name: float(value) for name, value in found.items()})
    assert {name: float(value) for name, value in found.items()} == pytest.approx(oracle["OBP"], rel=1e-9, abs=0)


def test_the_constants_of_scope_rl():
    """What tests/test_ope_oracle.py holds of sequences is what SCOPE-RL says: the mean over the steps that a trajectory may begin at."""
    on_path(Path(tempfile.gettempdir()) / f"fastq-{SCOPE_RL.replace('==', '-')}", "scope_rl", SCOPE_RL, *SCOPE_RL_DEPENDENCIES)
    import scope_rl.ope.discrete as scope

    oracle = runpy.run_path(str(Path(__file__).parents[1] / "test_ope_oracle.py"))
    log, steps = oracle["logged_trajectories"](), oracle["STEPS"]

    def value(estimator, start: int, length: int, **more: np.ndarray) -> float:
        kept = np.tile(np.arange(steps) >= start, len(log["action"]) // steps)
        arrays = {"action": log["action"], "reward": log["reward"], "pscore": log["pscore"], "evaluation_policy_action_dist": log["pi"], **more}
        kept_arrays = {name: array[kept] for name, array in arrays.items()}
        return float(estimator.estimate_policy_value(step_per_trajectory=length, gamma=oracle["GAMMA"], **kept_arrays))

    def from_each_step(estimator, **more: np.ndarray) -> float:
        return float(np.mean([value(estimator, start, steps - start, **more) for start in range(steps)]))

    model = {"state_action_value_prediction": log["q"]}
    found = {
        "dm": from_each_step(scope.DirectMethod(), **model),
        "pdis": from_each_step(scope.PerDecisionImportanceSampling()),
        "dr": from_each_step(scope.DoublyRobust(), **model),
        "snpdis, one step": value(scope.SelfNormalizedPDIS(), 0, 1),
        "sndr, one step": value(scope.SelfNormalizedDR(), 0, 1, **model),
    }
    print(found)
    assert found == pytest.approx(oracle["SCOPE"], rel=1e-9, abs=0)
