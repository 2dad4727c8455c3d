"""Figures for monitoring, in the format of Prometheus."""

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from shutil import disk_usage

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from wanforge.runtime.service.store.base import JobStore
from wanforge.runtime.service.web.monitor.answers import AnswerFigures
from wanforge.runtime.service.workers.status import BOUNDS, OUTCOMES, READY, ServiceStatus


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


class WorkerFigures:
    """What the supervisor tells of its workers."""

    def __init__(self, status: ServiceStatus) -> None:
        self.status = status

    def collect(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("wanforge_worker_ready", "Whether a worker can take jobs.", labels=["worker"])
        restarts = CounterMetricFamily("wanforge_worker_restarts", "Children that were replaced.", labels=["worker"])
        last = GaugeMetricFamily(
            "wanforge_worker_last_good_timestamp_seconds", "When a worker last completed a job.", labels=["worker"]
        )
        obstacles = self.status.obstacles()
        for worker in self.status.workers:
            ready.add_metric([worker.name], worker.state in READY and not obstacles)
            restarts.add_metric([worker.name], worker.restarts)
            if worker.last_good_at is not None:
                last.add_metric([worker.name], worker.last_good_at)
        yield from (ready, restarts, last, *self._usage(), self._attempts(), self._stages())

    def _usage(self) -> Iterator[Metric]:
        memory = GaugeMetricFamily("wanforge_worker_memory_bytes", "Memory of a worker's child.", labels=["worker"])
        gpu = GaugeMetricFamily("wanforge_gpu_memory_bytes", "Memory of a worker's GPU in use.", labels=["worker"])
        joules = CounterMetricFamily("wanforge_gpu_joules", "Energy that a worker's GPU took.", labels=["worker"])
        texts = CounterMetricFamily(
            "wanforge_text_embeddings", "Embeddings of prompts that were needed.", labels=["worker", "found"]
        )
        for worker in self.status.workers:
            usage = worker.usage
            memory.add_metric([worker.name], usage.memory_bytes)
            if usage.gpu_memory_bytes is not None:
                gpu.add_metric([worker.name], usage.gpu_memory_bytes)
            if usage.joules is not None:
                joules.add_metric([worker.name], usage.joules)
            texts.add_metric([worker.name, "yes"], usage.text_hits)
            texts.add_metric([worker.name, "no"], usage.text_misses)
        yield from (memory, gpu, joules, texts)

    def _attempts(self) -> Metric:
        attempts = CounterMetricFamily(
            "wanforge_attempts", "Attempts that ended, by how they did.", labels=["worker", "outcome"]
        )
        for worker in self.status.workers:
            # A series that begins with its first attempt would hide that attempt from `increase`.
            for outcome, count in {**dict.fromkeys(OUTCOMES, 0), **worker.outcomes}.items():
                attempts.add_metric([worker.name, outcome], count)
        return attempts

    def _stages(self) -> Metric:
        names = ["worker", "model", "size", "recipe", "stage"]
        stages = HistogramMetricFamily("wanforge_stage_seconds", "Duration of stages.", labels=names)
        for worker in self.status.workers:
            for each in worker.stages:
                counts = accumulate(each.times.counts)
                buckets = list(zip([*map(str, BOUNDS), "+Inf"], counts, strict=True))
                kind = each.kind
                labels = [worker.name, kind.model, kind.size, kind.recipe, each.stage]
                stages.add_metric(labels, buckets, each.times.sum)
        return stages


class DiskFigures:
    """The room on the disk of the service's folder."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def collect(self) -> Iterator[Metric]:
        usage = disk_usage(self.data)
        yield GaugeMetricFamily("wanforge_disk_free_bytes", "Free space on the disk of the service.", usage.free)
        yield GaugeMetricFamily("wanforge_disk_bytes", "Size of that disk.", usage.total)


def figures(store: JobStore, data: Path, answers: AnswerFigures, status: ServiceStatus | None) -> bytes:
    """All figures as text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StoreFigures(store))
    registry.register(DiskFigures(data))
    registry.register(answers)
    if status is not None:
        registry.register(WorkerFigures(status))
    return generate_latest(registry)
