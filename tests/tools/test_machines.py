"""Simulated clusters: what the store does there is what it does."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tools.machines import __main__ as program
from tools.machines.simulation import Leasing, Plan, Routing

DEADLY = Plan(4, 80, worker_life=60.0, router_life=120.0, seed=2)


def test_leases_lose_no_clip_and_a_router_loses_some(tmp_path: Path) -> None:
    leased, routed = Leasing(DEADLY, tmp_path).run(), Routing(DEADLY).run()
    assert (len(leased.waits), leased.lost) == (80, 0)
    assert leased.again > 0
    assert routed.lost > 0
    assert len(routed.waits) + routed.lost == 80


def test_designs_make_the_same_clips_where_nothing_dies(tmp_path: Path) -> None:
    plan = Plan(2, 40, write_seconds=0.0, note_seconds=0.0)
    leased, routed = Leasing(plan, tmp_path).run(), Routing(plan).run()
    assert math.isclose(leased.seconds, routed.seconds, rel_tol=0.1)
    assert (leased.again, leased.lost, routed.lost) == (0, 0, 0)


def test_a_slow_store_holds_workers_up(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    quick = Leasing(Plan(8, 60, 3.0), tmp_path).run()
    slow = Leasing(Plan(8, 60, 3.0, write_seconds=0.5), tmp_path / "slow").run()
    assert slow.store_share > 0.9
    assert slow.seconds > 1.5 * quick.seconds


def test_a_page_gets_its_tables_and_its_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "WORKERS", (1, 2))
    monkeypatch.setattr(program, "busy", lambda workers, disk: Routing(Plan(workers, 20)).run())
    monkeypatch.setattr(program, "failures_table", lambda seed: "| workers |")
    page = tmp_path / "machines.md"
    page.write_text(f"before {program.BEGIN} old {program.END} after")
    monkeypatch.setattr("sys.argv", ["machines", "--page", str(page)])
    program.main()
    text = page.read_text()
    assert (text[:6], text[-5:], "old" in text) == ("before", "after", False)
    assert "| 2 |" in text
    assert ElementTree.parse(tmp_path / "machines.svg").getroot().tag.endswith("svg")
