"""Settings that are refused before a server starts."""

from pathlib import Path

import pytest

from wanforge.errors import ConfigError
from wanforge.runtime.service.settings import (
    LEAST_LEASE_SECONDS,
    ServedBundle,
    ServeSettings,
    check_settings,
    load_settings,
)
from wanforge.runtime.service.store.base import Policy
from wanforge.runtime.service.workers.settings import WorkTimes


@pytest.mark.parametrize(
    "line",
    ["lease_seconds = -1", "most_lost = 0", "most_queued = -5", "result_seconds = nan", "event_seconds = inf"],
)
def test_a_policy_that_makes_no_sense_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(f"[policy]\n{line}\n")
    with pytest.raises(ConfigError, match=f"policy.{line.split()[0]}: "):
        load_settings(path)


def test_a_quota_below_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("[policy.quota]\nrunning = -1\n")
    with pytest.raises(ConfigError, match=r"policy\.quota\.running: "):
        load_settings(path)


def test_a_lease_outlasts_two_late_heartbeats() -> None:
    assert WorkTimes().heartbeat * 3 == LEAST_LEASE_SECONDS
    settings = ServeSettings(bundles=(ServedBundle("b"),), policy=Policy(lease_seconds=LEAST_LEASE_SECONDS - 1))
    with pytest.raises(ConfigError, match="use 15 or more"):
        check_settings(settings, has_keys=False)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("", ""), ("clips", "{}/clips"), ("/var/clips", "/var/clips"), ("s3://clips/x", "s3://clips/x")],
)
def test_a_folder_of_results_starts_from_that_of_the_settings(tmp_path: Path, written: str, meant: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(f'results = "{written}"\n')
    assert load_settings(path).results == meant.format(tmp_path)
