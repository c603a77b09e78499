"""What `infra/` says of the system is what the system is."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

INFRA = Path(__file__).parents[1] / "infra"


def names():
    """The metric names that the endpoint exposes, as Prometheus has them."""
    from serving.metrics import new_metrics

    found = set()
    for metric in new_metrics().registry.collect():
        kinds = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}[metric.type]
        found |= {metric.name + kind for kind in kinds}
    return found


def expressions():
    rules = yaml.safe_load((INFRA / "prometheus" / "alerts.yml").read_text())
    yield from ((rule["alert"], rule["expr"]) for group in rules["groups"] for rule in group["rules"])
    board = json.loads((INFRA / "grafana" / "fastq.json").read_text())
    yield from ((panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"])


def test_alerts_and_dashboard_name_metrics_that_there_are():
    known, used = names(), set()
    for where, expression in expressions():
        for name in re.findall(r"fastq_[a-z_]+", expression):
            assert name in known, f"{where}: {name}"
            used.add(name)
    assert len(used) > 8


def test_that_nothing_was_reported_yet_is_a_number():
    """An alert that compares with 0 says nothing where there is no number at all."""
    from serving.metrics import new_metrics

    assert new_metrics().registry.get_sample_value("fastq_outcomes_total", {"result": "accepted"}) == 0
    assert dict(expressions())["FastqNoOutcomes"].startswith('sum(increase(fastq_outcomes_total{result="accepted"}[1d])) == 0')


def test_alerts_fire_when_they_should_and_not_before():
    if shutil.which("promtool") is None:
        if os.environ.get("CI"):
            pytest.fail("promtool is missing: the alerts are a promise (apt-get install prometheus)")
        pytest.skip("promtool is missing (apt-get install prometheus)")
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=INFRA / "prometheus", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_its_page_with_rollback_first():
    pages = (INFRA / "runbook.md").read_text()
    rules = yaml.safe_load((INFRA / "prometheus" / "alerts.yml").read_text())
    heads = re.findall(r"^## (.*)$", pages, re.MULTILINE)
    assert heads[0] == "Rollback"
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        assert rule["alert"] in heads
        assert rule["annotations"]["runbook"] == f"infra/runbook.md#{rule['alert'].lower()}"


def test_the_runbook_names_commands_and_options_that_there_are():
    from typer.main import get_command

    from fastq.cli import app

    front, text = get_command(app), (INFRA / "runbook.md").read_text()
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found = [line for block in blocks for line in block.splitlines()] + re.findall(r"`(fastq [a-z][^`]*)`", text)
    assert len(found) > 12
    for line in found:
        words = shlex.split(line)
        if words[0] == "fastq":
            context = front.make_context("fastq", words[1:])
            name, command, rest = front.resolve_command(context, words[1:])
            command.make_context(name, rest + ["PLAYER"] * (line == "fastq forget"), parent=context)  # else it raises


def test_decisions_are_numbered_once_as_their_titles_say():
    files = sorted(path for path in (INFRA / "decisions").iterdir() if path.suffix == ".md")
    numbers = [path.name[:4] for path in files]
    assert len(set(numbers)) == len(numbers), numbers
    for path in files:
        lines = path.read_text().splitlines()
        assert lines[0].startswith(f"# {path.name[:4]}: "), path.name
        assert lines[2].startswith("- Status: "), path.name


def test_containers_are_pinned_healthy_unprivileged_and_without_default_passwords():
    tree = yaml.safe_load((INFRA / "compose.yaml").read_text())
    assert list(tree["networks"]) == ["fastq"]
    for name, service in tree["services"].items():
        assert service["networks"] == ["fastq"], name
        assert service["user"].split(":")[0] not in ("0", "root"), name
        assert service["healthcheck"]["test"], name
        tag = service["image"].partition(":")[2]
        assert tag, name
        assert "latest" not in tag, name
        assert re.search(r"\d+\.\d+", tag), name
    text = (INFRA / "compose.yaml").read_text()
    assert re.findall(r"\$\{\w*PASSWORD:[-=]", text) == []  # `:?` refuses to start without one; `:-` would be a default
    assert {"POSTGRES_PASSWORD:?", "REDIS_PASSWORD:?", "GRAFANA_PASSWORD:?"} <= set(re.findall(r"\w+PASSWORD:\?", text))
    published = [port for service in tree["services"].values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_prefect_yaml_is_what_fastq_deploy_does():
    from pipelines import deployments

    tree = yaml.safe_load((INFRA / "prefect.yaml").read_text())
    whens = {"retrain": "0 3 * * *", "monitor": deployments.HOURLY, "recommend_all": deployments.NIGHTLY, "compact": deployments.WEEKLY}
    assert {d["entrypoint"]: d["schedules"][0]["cron"] for d in tree["deployments"]} == {f"pipelines.deployments.{n}": when for n, when in whens.items()}
    for deployment in tree["deployments"]:
        assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
        assert deployment["work_pool"]["job_variables"] == {"env": deployments.RUNS_WITH}
        flow = getattr(deployments, deployment["entrypoint"].rpartition(".")[2])
        assert deployment["name"].endswith(flow.name.removeprefix("fastq "))


def test_the_rayservice_serves_what_serve_yaml_serves():
    service, policy = yaml.safe_load_all((INFRA / "kuberay" / "rayservice.yaml").read_text())
    ours = yaml.safe_load((INFRA.parent / "serving" / "serve.yaml").read_text())
    theirs = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert theirs["applications"][0]["import_path"] == ours["applications"][0]["import_path"]
    assert theirs["applications"][0]["deployments"][0]["name"] == ours["applications"][0]["deployments"][0]["name"]
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    # the operator hands the configuration over by the head's dashboard, once the head is ready, which no probe may make wait for what is handed over
    assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert not [c for group in groups for c in group["template"]["spec"]["containers"] if "readinessProbe" in c]
    assert policy["kind"] == "NetworkPolicy"
    ports = {rule["ports"][0]["port"]: rule for rule in policy["spec"]["ingress"] if "ports" in rule}
    assert ports[8265]["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    assert "from" not in ports[8000]
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(theirs)
