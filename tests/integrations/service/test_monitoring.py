"""The dashboard and the alerts ask for figures that there are, in a way that Grafana and Prometheus understand."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.integrations.service.programs import answering
from tests.processes import ROOT, free_port, wait_until
from tests.runtime.service.served import Rig, running
from wanforge.runtime.service.child.messages import ChildUsage
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.workers.status import ClipKind, ServiceStatus, WorkerStatus, write_status

FOLDER = ROOT / "integrations/service"
ALERTS, DASHBOARD = FOLDER / "alerts.yml", FOLDER / "grafana.json"
NAME = re.compile(r"\bwanforge_[a-z_]+")
SELECTOR = re.compile(r"\b(wanforge_[a-z_]+)\{([^}]*)\}")
GROUPED = re.compile(r"\b(?:by|on|without) \(([^)]*)\)")
SCRAPE = """
global: {scrape_interval: 250ms}
scrape_configs:
  - job_name: wanforge
    static_configs: [{targets: ["%s"]}]
"""


def queries() -> list[str]:
    """All queries of the dashboard."""
    found = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in found["panels"] for target in panel["targets"]]


def expressions() -> list[str]:
    """The expressions of the alerts."""
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule["expr"] for rule in group["rules"]]


def status(worked: int) -> ServiceStatus:
    """What a supervisor tells after some jobs."""
    usage = ChildUsage(memory_bytes=5, gpu_memory_bytes=7, joules=2.5)
    worker = WorkerStatus(name="gpu 0", state="idle", usage=usage, restarts=1, last_good_at=time.time())
    kind = ClipKind("tinywan", "128x112", "w8a8")
    for _ in range(worked):
        worker = worker.with_outcome("completed").with_times(kind, {"denoise": 1.5, "decode": 0.5})
    return ServiceStatus(supervisor=1, written=time.monotonic(), workers=(worker.with_outcome("gpu_failed"),))


@pytest.fixture
def busy(tinywan: Path, tmp_path: Path) -> Iterator[Rig]:
    """A server that has made a video."""
    with running(ServeSettings(data=str(tmp_path)), [("", tinywan)], tmp_path) as rig:
        write_status(tmp_path, status(1))
        rig.submit()
        rig.make()
        yield rig


def figures(rig: Rig) -> dict[str, set[str]]:
    """The names of a server's figures, with their labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(rig.client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return {name: labels for name, labels in found.items() if not name.endswith("_created")}


def test_every_figure_is_on_the_dashboard_and_every_query_asks_for_figures_that_there_are(busy: Rig) -> None:
    known = figures(busy)
    assert {name for query in queries() for name in NAME.findall(query)} == set(known)
    for query in (*queries(), *expressions()):
        used = set(NAME.findall(query))
        assert used <= set(known), query
        for name, inside in SELECTOR.findall(query):
            assert {re.split("[!=]", part)[0].strip() for part in inside.split(",")} <= known[name], query
        grouped = {label.strip() for labels in GROUPED.findall(query) for label in labels.split(",")}
        assert grouped <= set.union(*(known[name] for name in used)), query


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    ours = json.loads(DASHBOARD.read_text())
    read = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(ours)))
    assert is_within(ours, read)


def is_within(part: Any, whole: Any) -> bool:
    """Whether everything in a document is in another one, which may have more fields."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and is_within(part[key], whole[key]) for key in part)
    if isinstance(part, list):
        return len(part) == len(whole) and all(is_within(a, b) for a, b in zip(part, whole, strict=True))
    return bool(part == whole)


def test_panels_do_not_cover_each_other() -> None:
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    taken = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(taken) == len(set(taken))
    assert {x for x, _ in taken} == set(range(24))


@pytest.mark.slow
def test_the_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    for file in (ALERTS, Path(__file__).parent / "alerts.test.yml"):
        shutil.copy(file, tmp_path)
    assert "5 rules found" in promtool("check", "rules", str(tmp_path / "alerts.yml"))
    promtool("test", "rules", str(tmp_path / "alerts.test.yml"))


@pytest.mark.slow
def test_what_two_servers_tell_of_the_same_workers_is_counted_once(tmp_path: Path) -> None:
    told = {
        'wanforge_worker_ready{worker="gpu %d"%s}': "1+0x60",
        'wanforge_attempts_total{worker="gpu %d",outcome="completed"%s}': "0+1x60",
        'wanforge_worker_memory_bytes{worker="gpu %d"%s}': "5+0x60",
        'wanforge_jobs{state="queued"%.0s%s}': "7+0x60",
    }
    places = [(worker, f',instance="{server}"') for worker in (0, 1) for server in "ab"]
    series = {name % place: values for name, values in told.items() for place in places}
    expected = {
        "Ready workers": [("{}", 2)],
        "Videos in the last hour": [("{}", 120)],
        "Attempts by outcome": [('{outcome="completed"}', 2)],
        "Memory of workers": [('{worker="gpu 0"}', 5), ('{worker="gpu 1"}', 5)],
        "Jobs by state": [('{state="queued"}', 7)],
    }
    panels = {panel["title"]: panel["targets"][0]["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"]}
    asked = [
        {
            "expr": panels[title].replace("$__rate_interval", "5m"),
            "eval_time": "60m",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in samples],
        }
        for title, samples in expected.items()
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": asked}
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [test]}))
    promtool("test", "rules", str(tmp_path / "test.yml"))


def promtool(*arguments: str) -> str:
    """Run Prometheus's own tool."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_prometheus_answers_every_query_of_the_dashboard(busy: Rig, tmp_path: Path) -> None:
    with prometheus(busy.url.removeprefix("http://"), tmp_path / "prometheus") as client:

        def asked(query: str) -> list[Any]:
            written = query.replace("$__rate_interval", "5s")
            answer = client.get("/api/v1/query", params={"query": written}).json()
            assert answer["status"] == "success", (query, answer)
            found: list[Any] = answer["data"]["result"]
            return found

        wait_until(lambda: asked("wanforge_jobs"), 20)
        worked = 1

        def are_answered() -> bool:
            nonlocal worked
            worked += 1
            write_status(tmp_path, status(worked))
            busy.client.get("/v1/videos/none")
            time.sleep(0.2)
            return all(asked(query) for query in queries())

        wait_until(are_answered, 20)
        (completed,) = asked(next(query for query in queries() if 'outcome="completed"' in query))
        assert 0 < float(completed["value"][1]) <= 2 * worked
        assert {each["metric"]["stage"] for each in asked(next(q for q in queries() if "0.5, " in q))} == {
            "denoise",
            "decode",
        }


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[httpx2.Client]:
    """A Prometheus that looks at a server four times a second."""
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed (Debian's package prometheus)")
    folder.mkdir()
    (folder / "prometheus.yml").write_text(SCRAPE % target)
    place = f"127.0.0.1:{free_port()}"
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": place,
    }
    command = ["prometheus", *(f"--{name}={value}" for name, value in options.items()), "--log.level=error"]
    client = httpx2.Client(base_url=f"http://{place}", timeout=10)
    with answering(command, client, "/-/ready", folder) as found:
        yield found
