"""What `/metrics` shows, in Prometheus' names; the names are an interface, listed in the README."""

from __future__ import annotations

import contextlib
import csv
import socket
import threading
from collections import Counter as Counted
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from fastq.platform import Platform
from serving.decision_log import Decision

LATENCY = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
PROPENSITY = tuple(10.0**k for k in range(-6, 3))
TENTHS = tuple(k / 10 for k in range(1, 11))
PROXY_SECONDS = 0.5  # how long the proxy may take to say what it refused
TOGETHER = 512  # decisions that are counted at a time


@dataclass(eq=False)  # the registry keeps it by identity
class Distribution(Collector):
    """A histogram that takes whole batches: one of Prometheus' own would cost as much per decision as drawing it."""

    name: str
    says: str
    label: str
    buckets: tuple[float, ...]
    _counts: dict[str, np.ndarray] = field(default_factory=dict)
    _sums: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, label: str, values: np.ndarray) -> None:
        """Count values [N]."""
        with self._lock:
            counts = self._counts.setdefault(label, np.zeros(len(self.buckets) + 1, np.int64))
            np.add.at(counts, np.searchsorted(self.buckets, values), 1)
            self._sums[label] = self._sums.get(label, 0.0) + float(values.sum())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self.name, self.says, labels=[self.label])
        with self._lock:
            for label, counts in self._counts.items():
                upto = counts.cumsum().tolist()
                edges = [*map(str, self.buckets), "+Inf"]
                family.add_metric([label], list(zip(edges, upto, strict=True)), self._sums[label])
        yield family


@dataclass(eq=False)
class ProxyRefusals(Collector):
    """What this machine's proxy refused because a request had waited too long for a place, as its own socket tells; nothing where there is no such proxy.

    `address` is where Ray was told to put that socket; it puts it into a folder of the node's beside.
    """

    address: Path

    def collect(self) -> Iterator[CounterMetricFamily]:
        said = "Requests that the proxy of this machine refused since its start, and no replica saw; every replica shows the same number"
        family = CounterMetricFamily("fastq_proxy_refused", said)
        for address in self.address.parent.glob(f"*/{self.address.name}"):
            with contextlib.suppress(OSError, KeyError, ValueError), socket.socket(socket.AF_UNIX) as proxy:
                proxy.settimeout(PROXY_SECONDS)
                proxy.connect(str(address))
                proxy.sendall(b"show stat\n")
                told = b"".join(iter(lambda: proxy.recv(65536), b"")).decode()
                rows = csv.DictReader(told.removeprefix("# ").splitlines())
                family.add_metric([], sum(int(row["econ"]) for row in rows if row["svname"] == "BACKEND"))
                break
        yield family


@dataclass(frozen=True)
class Metrics:
    """The metrics of one process, in a registry of their own."""

    registry: CollectorRegistry
    requests: Counter
    seconds: Histogram
    decisions: Counter
    degraded: Counter
    cold_starts: Counter
    propensity: Distribution
    action: Distribution
    outcomes: Counter
    events: Counter
    batch: Histogram
    stage: Histogram
    refused: Counter
    refused_models: Counter
    model: Gauge

    _waiting: list[tuple[Decision, str]] = field(default_factory=list)
    _answered: dict[tuple[str, str, int], Callable[[float], None]] = field(default_factory=dict)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Show one answer."""
        show = self._answered.get((route, method, status))
        if show is None:
            counted, timed = self.requests.labels(route, method, str(status)), self.seconds.labels(route)

            def show(seconds: float) -> None:
                counted.inc()
                timed.observe(seconds)

            self._answered[route, method, status] = show
        show(seconds)

    def count(self, platform: Platform, decisions: Sequence[Decision], dry_run: bool) -> None:
        """Show decisions: as soon as there are `TOGETHER` of them, or somebody asks (`settle`), since many at a time cost little more than one."""
        dry = str(dry_run).lower()
        self._waiting.extend((decision, dry) for decision in decisions)
        if len(self._waiting) >= TOGETHER:
            self.settle(platform)

    def settle(self, platform: Platform) -> None:
        """Show the decisions that wait to be counted."""
        waiting = self._waiting[:]
        del self._waiting[: len(waiting)]
        for (policy, version, dry), number in Counted((d.policy, d.model_version or "", dry) for d, dry in waiting).items():
            self.decisions.labels(policy, version, dry).inc(number)
        decisions = [decision for decision, _ in waiting]
        drawn: list[Decision] = []
        for decision in decisions:
            if reason := decision.detail.get("degraded"):
                kind = reason.split(":")[0].split(",")[0][:40]
                self.degraded.labels(kind).inc()
                if kind in ("unknown player", "cold start"):
                    self.cold_starts.inc()
            if "seed" in decision.detail:
                drawn.append(decision)
        if not drawn:
            return
        versions = {d.model_version or "" for d in drawn}
        for version in versions:
            known = [d.propensity for d in drawn if d.propensity is not None and (d.model_version or "") == version]
            self.propensity.add(version, np.array(known, float))
        if platform.dimension_names:
            taken = np.array([[d.action[name] for name in platform.dimension_names] for d in drawn], float)
            shares = (taken - platform.bounds[:, 0]) / (platform.bounds[:, 1] - platform.bounds[:, 0])
            for name, share in zip(platform.dimension_names, shares.T, strict=True):
                self.action.add(name, share)


def new_metrics() -> Metrics:
    """Fresh metrics."""
    r = CollectorRegistry()
    propensity = Distribution("fastq_propensity", "Propensity of what was drawn, by model version", "model_version", PROPENSITY)
    action = Distribution("fastq_action_share", "Where in its range each dimension of what was drawn lies, 0 to 1", "dimension", TENTHS)
    r.register(propensity)
    r.register(action)
    stages = "Latency by stage: read (states), draw (the policy), decide (both and what is around them), log (until it is on disk), explain"
    outcomes = Counter("fastq_outcomes", "Outcomes reported", ["result"], registry=r)
    outcomes.labels("accepted")  # 0 from the start: that none ever comes is what an alert is there for
    return Metrics(
        r,
        Counter("fastq_requests", "Requests answered", ["route", "method", "status"], registry=r),
        Histogram("fastq_request_seconds", "From the request's arrival to the answer's last byte", ["route"], buckets=LATENCY, registry=r),
        Counter("fastq_decisions", "Decisions served", ["policy", "model_version", "dry_run"], registry=r),
        Counter("fastq_degraded", "Decisions served without a known, fresh state or under a cap, by reason", ["reason"], registry=r),
        Counter("fastq_cold_starts", "Decisions for players of whom no history is known", registry=r),
        propensity,
        action,
        outcomes,
        Counter("fastq_events", "Activity events received", ["result"], registry=r),
        Histogram("fastq_batch_players", "Players per batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000), registry=r),
        Histogram("fastq_stage_seconds", stages, ["stage"], buckets=LATENCY, registry=r),
        Counter("fastq_refused", "Requests refused because too many waited (overload) or a key asked too often (rate)", ["reason"], registry=r),
        Counter("fastq_models_refused", "Champions that were not taken into service", registry=r),
        Gauge("fastq_model_info", "The version in service is 1", ["version"], registry=r),
    )
