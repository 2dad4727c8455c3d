"""What machines tell each other of their workers."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.processes import wait_until
from tests.runtime.service.served import running
from tests.runtime.service.store.conftest import new_schema, postgres_url
from tests.runtime.service.store.rig import Rig
from tests.runtime.service.store.test_schema import run_script
from wanforge.errors import ConfigError
from wanforge.runtime.service.machines.crew import LOST_SECONDS, together
from wanforge.runtime.service.machines.report import machine_name, reported
from wanforge.runtime.service.machines.roll import FORGET_SECONDS, OTHER_VERSION, Member, Roll
from wanforge.runtime.service.settings import ServedBundle, ServeSettings, check_settings
from wanforge.runtime.service.store.sql_store import open_store
from wanforge.runtime.service.workers.status import ServiceStatus, WorkerStatus, write_status

__all__ = ["postgres_url"]


def status(state: str = "idle", problem: str = "", age: float = 0.0, bundles: tuple[str, ...] = ()) -> ServiceStatus:
    worker = WorkerStatus(name="gpu 0", state=state, job="video_1" if state == "working" else None)
    written = time.monotonic() - age
    return ServiceStatus(supervisor=1, written=written, workers=(worker,), problem=problem, bundles=bundles)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    is_file = request.param == "sqlite"
    found = Rig(str(tmp_path / "jobs.sqlite") if is_file else new_schema(request.getfixturevalue("postgres_url")))
    yield found
    found.close()


def seconds(roll: Roll) -> dict[str, int]:
    return {each.name: round(each.seconds) for each in roll.machines()}


def test_machines_are_listed_until_they_leave_or_are_forgotten(rig: Rig) -> None:
    roll = Roll.of(rig.open())
    roll.database.wall = lambda transaction: rig.clock()  # type: ignore[method-assign]
    roll.note("a", status())
    rig.clock.seconds += 20
    roll.note("b", status(age=3.0))
    assert seconds(roll) == {"a": 20, "b": 3}
    rig.clock.seconds += FORGET_SECONDS - 20
    assert seconds(roll) == {"b": 583}
    roll.note("b", status())
    assert seconds(roll) == {"b": 0}
    roll.leave("b")
    assert roll.machines() == []


def test_noting_wakes_nobody_and_moves_no_time(rig: Rig) -> None:
    store = rig.open()
    store.sweep()
    with closing(store.news()) as news:
        rig.clock.seconds += 5
        Roll.of(store).note("a", status())
        if "://" in rig.place:  # SQLite tells of everything that is written, and nobody shares it with other machines
            assert not news.wait(0.2)
    with store.database.read() as transaction:
        found = transaction.row("SELECT wall FROM clock")
    assert found is not None
    assert found["wall"] == rig.clock.seconds - 5


def test_a_machine_of_another_version_is_the_problem_of_itself(rig: Rig) -> None:
    roll = Roll.of(rig.open())
    roll.note("a", status())
    roll.note("b", status())
    run_script(rig, """UPDATE machines SET status = '{"new": 1}' WHERE name = 'b'""")
    found = {each.name: each.status for each in roll.machines()}
    assert (found["a"].problem, found["b"].problem) == ("", OTHER_VERSION)
    assert together(roll.machines()).obstacles() == []


def test_a_server_counts_on_the_workers_of_all_machines() -> None:
    machines = [Member("a", 1.0, status("working")), Member("b", 1.0, status("broken"))]
    found = together(machines)
    assert [(each.name, each.state) for each in found.workers] == [("a/gpu 0", "working"), ("b/gpu 0", "broken")]
    assert found.obstacles() == []
    assert together(machines[1:]).obstacles() == ["b/gpu 0 is broken"]


def test_a_machine_that_says_nothing_has_lost_workers() -> None:
    found = together([Member("a", LOST_SECONDS + 4, status("working"))])
    assert found.obstacles() == ["a/gpu 0 is lost: its machine was last heard of 34 s ago"]
    assert found.workers[0].job is None


def test_a_machine_without_room_has_no_workers_that_are_ready() -> None:
    full = Member("a", 0.0, status(problem="its disk is full"))
    assert together([full]).obstacles() == ["a: its disk is full"]
    found = together([full, Member("b", 0.0, status())])
    assert found.obstacles() == []
    assert [(each.state, each.reason) for each in found.workers] == [("waiting", "its disk is full"), ("idle", "")]


def test_a_list_without_machines_says_what_to_start() -> None:
    assert "wanforge serve --role worker" in together([]).obstacles()[0]


def test_an_api_server_tells_of_bundles_that_no_worker_serves(tinywan: Path, tmp_path: Path) -> None:
    with running(ServeSettings(role="api", data=str(tmp_path)), [("", tinywan)], tmp_path) as rig:
        roll = Roll.of(rig.store)
        assert rig.client.get("/readyz").status_code == 503
        roll.note("a", status(bundles=("another",)))
        told = rig.client.get("/readyz").json()
        assert (told["ready"], told["workers"][0]["name"]) == (True, "a/gpu 0")
        assert told["reasons"] == ["no worker serves tinywan; serve the same bundles with every role"]
        roll.note("b", status(bundles=(rig.service.catalogue.served[0].fingerprint,)))
        assert rig.client.get("/readyz").json()["reasons"] == []
        assert 'wanforge_worker_ready{worker="b/gpu 0"} 1.0' in rig.client.get("/metrics").text


def test_a_worker_answers_monitors_by_any_name_and_nobody_else(tinywan: Path, tmp_path: Path) -> None:
    with running(ServeSettings(role="worker", data=str(tmp_path)), [("", tinywan)], tmp_path) as rig:
        write_status(tmp_path, status())
        answers = {path: rig.client.get(path, headers={"Host": "10.0.0.7:8000"}) for path in ("/livez", "/readyz")}
        assert [each.status_code for each in answers.values()] == [200, 200]
        assert rig.client.get("/metrics").status_code == 200
        assert [rig.client.get(path).status_code for path in ("/", "/v1/models", "/v1/videos")] == [404] * 3


@pytest.mark.slow
def test_a_machine_reports_while_it_works_and_leaves_the_list(tmp_path: Path, postgres_url: str) -> None:
    url = new_schema(postgres_url)
    with closing(open_store(url)) as store:
        roll = Roll.of(store)
        with reported(ServeSettings(store=url, data=str(tmp_path)), store):
            write_status(tmp_path, status())
            wait_until(roll.machines)
            (found,) = roll.machines()
            assert (found.name, found.status.workers[0].state) == (machine_name(tmp_path), "idle")
            write_status(tmp_path, status("broken"))
            wait_until(lambda: roll.machines()[0].status.workers[0].state == "broken")
        assert roll.machines() == []
        assert not is_reporting()


def test_a_machine_without_workers_reports_nothing(tmp_path: Path) -> None:
    settings = ServeSettings(store="postgresql://host/jobs", data=str(tmp_path))
    with closing(open_store(tmp_path / "jobs.sqlite")) as store:
        with reported(settings, store):
            assert is_reporting()
        for alone in (replace(settings, role="api"), replace(settings, store="")):
            with reported(alone, store):
                assert not is_reporting()


def is_reporting() -> bool:
    """Whether a thread of this process tells other machines of its workers."""
    return "report" in {thread.name for thread in threading.enumerate()}


def test_parts_that_would_not_find_each_other_are_refused() -> None:
    settings = ServeSettings(role="api", bundles=(ServedBundle("b"),))
    with pytest.raises(ConfigError, match=r"where the workers of other machines cannot see it.*store = "):
        check_settings(settings, has_keys=True)
    shared = replace(settings, role="worker", store="postgresql://host/jobs")
    with pytest.raises(ConfigError, match=r"where the server of other machines cannot see them.*results = "):
        check_settings(shared, has_keys=True)
    check_settings(replace(shared, results="s3://clips"), has_keys=True)
    check_settings(replace(shared, results="s3://clips", host="0.0.0.0"), has_keys=False)
