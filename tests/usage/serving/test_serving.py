"""A few faults while a server makes clips, and trials that notice what is wrong."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.usage.commands import ROOT, clean_environment
from tests.usage.serving.clips import USUAL
from tests.usage.serving.kinds import KINDS, do_nothing
from tests.usage.serving.server import Server
from tests.usage.serving.trial import Kind, Stage, Trial, leftovers, look, repeated_runs

SHORT = "a child is killed,clients leave during uploads"


@pytest.mark.slow
def test_nothing_is_lost_when_a_child_is_killed_and_clients_leave() -> None:
    words = [sys.executable, "-m", "tests.usage.serving.faults", "--trials", "1", "--seed", "3", "--only", SHORT]
    ended = subprocess.run(words, cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line.split(" | ")[0] for line in ended.stdout.splitlines()[1:]] == [
        f"| {each}" for each in SHORT.split(",")
    ]


def test_every_kind_has_a_name_of_its_own() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) == 12


class Answers:
    """A connection to a server that says of every job the same, and hands out the same bytes."""

    def __init__(self, **video: object) -> None:
        self.said = {"status": "completed", "attempt": 1, "error": None} | video
        self.http = self

    def video(self, job: str) -> dict[str, object]:
        return self.said

    def get(self, path: str, **options: object) -> "Answers":
        return self

    status_code, content = 200, b"half"


KNOWN = {clip: dict.fromkeys(("video", "thumbnail", "spritesheet"), "whole") for clip in USUAL}


def seen(tmp_path: Path, **video: object) -> Trial:
    """A trial with one job, of which a server says this."""
    server = Server(tmp_path, tmp_path)
    server.connection = Answers(**video)  # type: ignore[assignment]
    stage, done = Stage(server, Random(1), {"video_1": USUAL[0]}), Trial(0)
    look(Kind("test", do_nothing, codes=frozenset({"disk_full"})), stage, KNOWN, done)
    return done


def test_a_file_with_other_bytes_is_noticed(tmp_path: Path) -> None:
    assert len(seen(tmp_path).half) == 3


def test_another_end_than_the_intended_is_noticed(tmp_path: Path) -> None:
    intended = {"code": "disk_full", "message": ""}
    assert seen(tmp_path, status="failed", error=intended).complaints == []
    assert len(seen(tmp_path / "code", status="failed", error={"code": "internal_error"}).lost) == 1
    assert len(seen(tmp_path / "cancelled", status="cancelled").lost) == 1


def test_too_many_attempts_are_noticed(tmp_path: Path) -> None:
    [fault] = seen(tmp_path, status="failed", attempt=3, error={"code": "disk_full"}).faults
    assert "was started 3 times" in fault


def test_what_is_left_and_what_runs_twice_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.usage.serving.trial.CALM_S", 0.1)
    server = Server(tmp_path, tmp_path)
    staging = server.data / "results" / "staging"
    staging.mkdir(parents=True)
    (tmp_path / "runs").write_text("video_1/1\nvideo_2/1\nvideo_1/1\n")
    assert (leftovers(server), repeated_runs(server)) == ([], ["the attempt video_1/1 was run 2 times"])
    (staging / "worker").mkdir()
    (server.data / "results" / ".0123.partial.mp4").touch()
    (server.temporary / "upload").touch()
    assert len(leftovers(server)) == 3
