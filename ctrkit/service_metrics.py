"""What the service counts, in Prometheus' text format, of one process or the sum of several."""

import os
import time
from collections.abc import Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Where processes that serve together keep their counts. The library reads it when it is imported."""
SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds of the histogram of latencies."""
LOADED = "ctrkit_model_loaded_timestamp_seconds"


class Metrics:
    """The counters of a process, or, with `FOLDER_VARIABLE` set, its share of those of all."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._together = FOLDER_VARIABLE in os.environ
        registry = self.registry
        if not self._together:
            ProcessCollector(registry=registry)
        self._requests = Counter(
            "ctrkit_requests", "Requests answered, by path and status.", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "ctrkit_score_seconds",
            "From the beginning of a request for scores to its answer.",
            buckets=SECONDS,
            registry=registry,
        )
        self._ads = Counter("ctrkit_scored_ads", "Candidate ads scored.", registry=registry)
        self._known_ads = Counter(
            "ctrkit_known_ads",
            "Of the ads scored, those that were asked for lately in the same words.",
            registry=registry,
        )
        self._unknown = Counter(
            "ctrkit_unknown_values",
            "Values that were missing or that training did not know, pictures without a vector included, by feature.",
            ["feature", "kind"],
            registry=registry,
        )
        self._swaps = Counter(
            "ctrkit_model_swaps",
            "Attempts of the service, all its processes together, to swap a model in, by what came of them.",
            ["result"],
            registry=registry,
        )
        self._loaded = Gauge(
            LOADED,
            "When the model in use was loaded, by its digest.",
            ["model"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.open = Gauge(
            "ctrkit_open_requests",
            "Requests for scores begun and not answered.",
            registry=registry,
            multiprocess_mode="livesum",
        )

    def answered(self, path: str, status: int) -> None:
        """Count one answer."""
        self._requests.labels(path, str(status)).inc()

    def scored(self, seconds: float, ads: int, known_ads: int, unknown: Mapping[str, Mapping[str, int]]) -> None:
        """Count one request that got scores. known_ads: ads that were asked for lately; unknown: feature → kind → how
        many such values."""
        self._seconds.observe(seconds)
        self._ads.inc(ads)
        self._known_ads.inc(known_ads)
        for feature, kinds in unknown.items():
            for kind, count in kinds.items():
                self._unknown.labels(feature, kind).inc(count)

    def swapped(self, result: str) -> None:
        """Count an attempt to swap the model: "swapped", "same" or "failed"."""
        self._swaps.labels(result).inc()

    def in_use(self, model: str, before: str | None = None) -> None:
        """Say that a model is in use from now on, and another no longer. Models by digest."""
        if before is not None and before != model:
            self._loaded.labels(before).set(0)
            if not self._together:
                self._loaded.remove(before)
        self._loaded.labels(model).set(time.time())

    def text(self) -> bytes:
        """Return all of it, of all processes, in Prometheus' text format."""
        registry = self.registry
        if self._together:
            registry = CollectorRegistry()
            registry.register(_OfAll())
        return generate_latest(registry)


class _OfAll(Collector):
    """The counts of all processes, without the models of before, whose numbers only 0 can take back."""

    def collect(self) -> Iterable[Metric]:
        for metric in multiprocess.MultiProcessCollector(None).collect():  # type: ignore[no-untyped-call]
            if metric.name == LOADED:
                metric.samples = [sample for sample in metric.samples if sample.value > 0]
            yield metric
