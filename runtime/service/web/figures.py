"""Figures for monitoring, in the format of Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from wanforge.runtime.service.store.base import JobStore


class StoreFigures:
    """What the job store knows, counted anew each time that somebody asks."""

    def __init__(self, store: JobStore) -> None:
        self.store = store

    def collect(self) -> Iterator[Metric]:
        census = self.store.census()
        jobs = GaugeMetricFamily("wanforge_jobs", "Jobs in the store, by state.", labels=["state"])
        for state, count in census.states.items():
            jobs.add_metric([state.value], count)
        yield jobs
        yield GaugeMetricFamily(
            "wanforge_queue_oldest_seconds", "How long the oldest queued job waits.", census.oldest_queued_seconds
        )


def figures(store: JobStore) -> bytes:
    """All figures as text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StoreFigures(store))
    return generate_latest(registry)
