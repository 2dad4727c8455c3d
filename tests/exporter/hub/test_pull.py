"""A pull brings complete and checked files or none, continues what was begun, and says what is wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from tests.exporter.checkpoint.finder.layouts import hub_repository
from tests.exporter.hub.conftest import FILES, OWN, SHARED, environment, sha256
from tests.exporter.hub.stand_in import COMMIT, Hub
from tests.processes import start
from wanforge.cli import cli
from wanforge.configs.hub import repositories
from wanforge.errors import CheckpointError, ResourceError
from wanforge.exporter.hub import pull as pulls
from wanforge.exporter.hub import remote
from wanforge.exporter.hub.pull import Item, pull, survey
from wanforge.exporter.hub.record import NAME

DIT, VAE, TOKENIZER = "tiny-t2v-quant.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json"
WANTED = {(OWN, DIT), (SHARED, VAE), (SHARED, TOKENIZER)}
Pulling = Callable[..., "subprocess.Popen[str]"]
MAIN = """
from pathlib import Path
import sys
from wanforge.configs import hub
hub.CONFIGS = Path(sys.argv.pop(1))
from wanforge.cli import main
main()
"""


def pulled(to: Path) -> list[Item]:
    return pull(to, repositories("tiny-t2v"))


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["pull", *map(str, arguments)])


def files_in(to: Path) -> dict[str, bytes]:
    """The files below a folder that an import would see, by path."""
    found = {str(path.relative_to(to)): path for path in to.rglob("*") if path.is_file() and path.name != NAME}
    return {name: path.read_bytes() for name, path in found.items() if not Path(name).name.startswith(".")}


def expected(*wanted: tuple[str, str]) -> dict[str, bytes]:
    return {f"{repository}/{path}": FILES[repository, path] for repository, path in wanted or WANTED}


def partials(to: Path) -> list[Path]:
    return sorted(to.rglob(".*.partial"))


def broken(hub: Hub, to: Path, after: int = 20_000) -> None:
    """Begin a pull whose connection is reset in the first file, again and again."""
    hub.cuts = [after, *[0] * 20]
    with pytest.raises(ResourceError, match=r"connection broke .*; the same command continues where it stopped"):
        pulled(to)
    hub.cuts = []


def test_every_file_is_fetched_under_its_name(here: Hub, tmp_path: Path) -> None:
    items = pulled(tmp_path / "to")
    assert files_in(tmp_path / "to") == expected()
    assert {(item.repository, item.file.path) for item in items} == WANTED
    assert not partials(tmp_path / "to")


def test_the_commit_and_the_hashes_are_recorded_beside_the_files(here: Hub, tmp_path: Path) -> None:
    pulled(tmp_path)
    record = json.loads((tmp_path / SHARED / NAME).read_text())
    assert record["commit"] == COMMIT
    assert record["files"] == {
        path: {"bytes": len(data), "sha256": sha256(data)}
        for (repository, path), data in FILES.items()
        if repository == SHARED
    }


def test_a_second_pull_checks_and_fetches_nothing(here: Hub, tmp_path: Path) -> None:
    pulled(tmp_path)
    here.asked.clear()
    assert {item.state for item in pulled(tmp_path)} == {"there"}
    assert here.asked == []


def test_later_pulls_take_the_commit_of_the_first(here: Hub, tmp_path: Path) -> None:
    pulled(tmp_path)
    (tmp_path / OWN / DIT).unlink()
    here.asked.clear()
    pulled(tmp_path)
    assert all(f"/resolve/{COMMIT}/" in path for _, path, *_ in here.asked if "/resolve/" in path)


def test_what_the_hub_changed_since_the_first_pull_is_refused(here: Hub, tmp_path: Path) -> None:
    pulled(tmp_path)
    (tmp_path / OWN / DIT).unlink()
    here.files[OWN, DIT] = b"another" * 8000
    with pytest.raises(
        CheckpointError, match=f"has SHA-256 {sha256(b'another' * 8000)}, expected {sha256(FILES[OWN, DIT])}"
    ):
        pulled(tmp_path)
    assert not (tmp_path / OWN / DIT).exists()
    assert not partials(tmp_path)


def test_a_file_with_another_hash_than_the_configured_one_is_not_kept(
    here: Hub, tmp_path: Path, published: Callable[..., Path]
) -> None:
    published(Wan2__1_VAE__pth="0" * 64)
    with pytest.raises(CheckpointError, match=f"has SHA-256 {sha256(FILES[SHARED, VAE])}, expected {'0' * 64}"):
        pulled(tmp_path)
    assert not (tmp_path / SHARED / VAE).exists()
    assert not partials(tmp_path)
    assert (tmp_path / OWN / DIT).exists()


def test_a_file_that_was_damaged_later_is_reported(here: Hub, tmp_path: Path) -> None:
    pulled(tmp_path)
    (tmp_path / SHARED / VAE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="delete it, and the same command fetches it again"):
        pulled(tmp_path)


def test_a_file_that_is_there_without_a_record_is_taken_if_the_hub_knows_its_hash(here: Hub, tmp_path: Path) -> None:
    (tmp_path / OWN).mkdir(parents=True)
    (tmp_path / OWN / DIT).write_bytes(FILES[OWN, DIT])
    states = {item.file.path: item.state for item in pulled(tmp_path)}
    assert states[DIT] == "there"
    assert all(sha256(FILES[OWN, DIT]) not in path for path, _ in here.gets())
    assert DIT in json.loads((tmp_path / OWN / NAME).read_text())["files"]


def test_a_file_of_which_nothing_tells_whether_it_is_right_stays(here: Hub, tmp_path: Path) -> None:
    place = tmp_path / SHARED / TOKENIZER
    place.parent.mkdir(parents=True)
    place.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="move it away"):
        pulled(tmp_path)
    assert place.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("recipe", "taken"), [("w8a8", DIT), ("bf16-sla", "tiny-t2v.pth"), ("w8a8-64", "tiny-t2v.pth")]
)
def test_the_recipe_decides_which_denoiser_is_fetched(here: Hub, tmp_path: Path, recipe: str, taken: str) -> None:
    assert command("tiny-t2v", "--to", tmp_path, "--recipe", recipe).exit_code == 0
    assert {path.name for path in (tmp_path / OWN).glob("*.pth")} == {taken}


def test_a_broken_connection_is_opened_again(here: Hub, tmp_path: Path) -> None:
    here.cuts = [7000, 7000, 7000]
    pulled(tmp_path)
    assert files_in(tmp_path) == expected()
    starts = [int(ranges.removeprefix("bytes=").rstrip("-")) for _, ranges in here.gets() if ranges]
    assert len(starts) == 3
    assert starts == sorted(set(starts))


def test_a_second_pull_continues_where_the_first_broke(here: Hub, tmp_path: Path) -> None:
    broken(here, tmp_path)
    assert files_in(tmp_path) == {}
    (partial,) = partials(tmp_path)
    have = partial.stat().st_size
    assert 0 < have <= 20_000
    assert survey(tmp_path, repositories("tiny-t2v"))[0].left_bytes == len(FILES[OWN, DIT]) - have
    here.asked.clear()
    assert pulled(tmp_path)[0].state == "begun"
    assert here.gets()[0][1] == f"bytes={have}-"
    assert files_in(tmp_path) == expected()
    assert not partials(tmp_path)


def test_what_was_begun_of_other_bytes_is_not_continued(here: Hub, tmp_path: Path) -> None:
    broken(here, tmp_path)
    here.files[OWN, DIT] = FILES[OWN, DIT][::-1]
    pulled(tmp_path)
    assert (tmp_path / OWN / DIT).read_bytes() == FILES[OWN, DIT][::-1]
    assert not partials(tmp_path)


def test_a_partial_file_that_is_wrong_is_found_out_and_deleted(here: Hub, tmp_path: Path) -> None:
    broken(here, tmp_path)
    (partial,) = partials(tmp_path)
    partial.write_bytes(bytes(partial.stat().st_size))
    with pytest.raises(CheckpointError, match=r"it was deleted\. Run the same command again"):
        pulled(tmp_path)
    pulled(tmp_path)
    assert files_in(tmp_path) == expected()


def test_a_partial_file_that_is_too_long_is_begun_anew(here: Hub, tmp_path: Path) -> None:
    broken(here, tmp_path)
    (partial,) = partials(tmp_path)
    partial.write_bytes(bytes(100_000))
    pulled(tmp_path)
    assert files_in(tmp_path) == expected()


def test_ranges_that_a_server_ignores_do_no_harm(here: Hub, tmp_path: Path) -> None:
    here.cuts, here.ignores_ranges = [7000], True
    pulled(tmp_path)
    assert files_in(tmp_path) == expected()


def test_a_token_goes_to_the_hub_and_not_to_other_servers(
    here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pulled(tmp_path)
    told = {(path.startswith("/blobs/"), authorization) for _, path, _, authorization in here.asked}
    assert told == {(False, "Bearer hf_secret"), (True, "")}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"token": "hf_secret"}, "log in with `hf auth login` or set HF_TOKEN"),
        ({"status": 403}, "log in with `hf auth login` or set HF_TOKEN"),
        ({"files": {}}, "status 401"),
        ({"files": {(OWN, "other"): b"x"}}, f"the hub has no {DIT} at revision main (status 404)"),
        ({"status": 500}, "answered with status 500"),
        ({"status": 429}, "answered with status 429"),
    ],
)
def test_what_the_hub_refuses_is_explained(here: Hub, tmp_path: Path, setting: dict[str, Any], words: str) -> None:
    for name, value in setting.items():
        setattr(here, name, value)
    result = command("tiny-t2v", "--to", tmp_path / "to")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert words in result.stderr
    assert not (tmp_path / "to").exists()


def test_a_revision_that_is_gone_is_explained(here: Hub, tmp_path: Path) -> None:
    pulled(tmp_path)
    (tmp_path / OWN / DIT).unlink()
    here.commit = "f" * 40
    with pytest.raises(CheckpointError, match=f"has no {DIT} at revision {COMMIT}"):
        pulled(tmp_path)


def test_without_a_network_it_is_said_so(here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(constants, name, getattr(constants, name).replace(here.endpoint, "http://127.0.0.1:9"))
    result = command("tiny-t2v", "--to", tmp_path)
    assert result.exit_code == 1
    assert "http://127.0.0.1:9 cannot be reached" in result.stderr


def test_a_server_that_is_no_hub_is_recognised(here: Hub, tmp_path: Path) -> None:
    here.commit = ""
    with pytest.raises(ResourceError, match="does not answer as a Hugging Face Hub does"):
        pulled(tmp_path)


def test_nothing_is_asked_offline(here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match=f"{OWN}/{DIT} is not here, and HF_HUB_OFFLINE forbids asking for it"):
        pulled(tmp_path)
    assert here.asked == []


def test_a_complete_pull_is_checked_offline(here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled(tmp_path)
    here.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert {item.state for item in pulled(tmp_path)} == {"there"}
    assert here.asked == []


@pytest.fixture
def hub_cache(here: Hub, tmp_path: Path) -> Path:
    """The cache of huggingface_hub with both repositories."""
    for name in (OWN, SHARED):
        for (repository, path), data in FILES.items():
            if repository == name:
                (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name / path).write_bytes(data)
        hub_repository(tmp_path / name, Path(constants.HF_HUB_CACHE), name, COMMIT)
        shutil.rmtree(tmp_path / name)
    return Path(constants.HF_HUB_CACHE)


@pytest.mark.parametrize("is_offline", [False, True])
@pytest.mark.parametrize("can_link", [True, False])
@pytest.mark.usefixtures("hub_cache")
def test_files_of_the_cache_are_not_fetched(
    here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_offline: bool, can_link: bool
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not can_link:
        monkeypatch.setattr(pulls.os, "link", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    items = pulled(tmp_path / "to")
    assert {item.state for item in items} == {"cached"}
    assert {item.left_bytes for item in items} == {0}
    assert files_in(tmp_path / "to") == expected()
    assert here.gets() == []
    assert bool(here.asked) != is_offline
    assert {path.stat().st_nlink for path in (tmp_path / "to" / OWN).glob("*.pth")} == {2 if can_link else 1}


def test_a_damaged_file_of_the_cache_is_not_taken(here: Hub, tmp_path: Path, hub_cache: Path) -> None:
    (link,) = hub_cache.rglob(DIT)
    link.resolve().write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=f"expected {sha256(FILES[OWN, DIT])}"):
        pulled(tmp_path / "to")
    assert not (tmp_path / "to" / OWN / DIT).exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulls, "free_disk_bytes", lambda path: 50_000)
    with pytest.raises(ResourceError, match=r"0.00 GB are to be written, but only 0.00 GB are free"):
        pulled(tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_disk_that_becomes_full_keeps_what_was_fetched(
    here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = remote.CountedFile.write

    def full(self: remote.CountedFile, data: bytes) -> int:
        if self.tell() >= 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(remote.CountedFile, "write", full)
    result = command("tiny-t2v", "--to", tmp_path)
    assert result.exit_code == 1
    assert f"No space left on device at {tmp_path / OWN}" in result.stderr
    assert "free some space or choose another place" in result.stderr
    assert files_in(tmp_path) == {}
    assert partials(tmp_path)[0].stat().st_size == 10_000


def test_a_dry_run_tells_what_is_there_and_writes_nothing(here: Hub, tmp_path: Path) -> None:
    broken(here, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = command("tiny-t2v", "--to", tmp_path, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    sizes = [len(FILES[each]) for each in ((OWN, DIT), (SHARED, VAE), (SHARED, TOKENIZER))]
    assert [each["state"] for each in found["files"]] == ["begun", "absent", "absent"]
    assert [each["bytes"] for each in found["files"]] == sizes
    assert found["bytes"] == sum(sizes)
    assert found["left_bytes"] == sum(sizes) - partials(tmp_path)[0].stat().st_size
    assert found["files"][0]["sha256"] == sha256(FILES[OWN, DIT])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "would be written" in command("tiny-t2v", "--to", tmp_path, "--dry-run").stdout


def test_the_command_says_what_it_fetched_and_what_comes_next(here: Hub, tmp_path: Path) -> None:
    result = command("tiny-t2v", "--recipe", "bf16-sla")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "cache" / "wanforge" / "models"
    assert files_in(folder).keys() == {f"{OWN}/tiny-t2v.pth", f"{SHARED}/{VAE}", f"{SHARED}/{TOKENIZER}"}
    last = result.stdout.splitlines()[-1]
    assert last.endswith(f"in {folder}; next: wanforge import tiny-t2v --recipe bf16-sla --out tiny-t2v")
    again = json.loads(command("tiny-t2v", "--recipe", "bf16-sla", "--json").stdout)
    assert {each["state"] for each in again["files"]} == {"there"}


def test_progress_counts_the_bytes_of_each_file_and_of_its_check(here: Hub, tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int, str]] = {}

    def note(stage: str, done: int, total: int, unit: str = "", /) -> None:
        assert done >= seen.get(stage, (0, 0, ""))[0]
        seen[stage] = done, total, unit

    pull(tmp_path, repositories("tiny-t2v"), note)
    for name in (DIT, f"check {DIT}"):
        assert seen[name] == (len(FILES[OWN, DIT]), len(FILES[OWN, DIT]), "B")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tinywan", "tinywan is not published; models that are: tiny-t2v"),
        ("tiny-t2", "did you mean tiny-t2v?"),
        ("a.toml", "no model is called 'a.toml'"),
    ],
)
def test_a_model_that_is_not_published_is_refused(here: Hub, name: str, words: str) -> None:
    result = command(name)
    assert result.exit_code == 1
    assert words in result.stderr
    assert here.asked == []


@pytest.fixture
def child(hub: Hub, published: Callable[..., Path], tmp_path: Path) -> Iterator[Pulling]:
    """A function that starts a pull in a process of its own. At first, the hub stops in the middle of a file."""
    hub.files, hub.cuts, hub.stall = dict(BIG), [22_000_000], True
    folder, begun = published(), list["subprocess.Popen[str]"]()

    def run(*arguments: object) -> "subprocess.Popen[str]":
        words = (folder, "pull", "tiny-t2v", "--to", tmp_path / "to", *arguments)
        begun.append(start(MAIN, *words, **environment(hub, tmp_path)))
        return begun[-1]

    yield run
    for process in begun:
        process.kill()
        process.communicate()


def wait_until(is_true: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


PIECE = 10 << 20
"""The bytes that huggingface_hub writes at a time."""
BIG = {**FILES, (OWN, DIT): os.urandom(1 << 20) * 25}


@pytest.mark.slow
def test_a_pull_that_is_killed_half_way_is_continued(hub: Hub, tmp_path: Path, child: Pulling) -> None:
    process = child()
    wait_until(lambda: partials(tmp_path) and partials(tmp_path)[0].stat().st_size > 2 * PIECE - 10_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert files_in(tmp_path / "to") == {}
    have = partials(tmp_path)[0].stat().st_size
    process = child()
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr
    assert f"bytes={have}-" in [ranges for _, ranges in hub.gets()]
    assert (tmp_path / "to" / OWN / DIT).read_bytes() == BIG[OWN, DIT]
    assert not partials(tmp_path)


@pytest.mark.slow
def test_of_two_pulls_at_once_one_waits_and_finds_everything_there(hub: Hub, tmp_path: Path, child: Pulling) -> None:
    first = child()
    wait_until(lambda: partials(tmp_path))
    second = child("--json")
    assert second.stderr is not None
    said = second.stderr.readline()
    assert f"{tmp_path / 'to' / OWN} is in use by process {first.pid}" in said, said
    assert "waiting for it" in said
    hub.is_over.set()  # the connection ends, and the first pull opens another
    for process in (first, second):
        out, err = process.communicate()
        assert process.returncode == 0, err
    assert {each["state"] for each in json.loads(out)["files"]} == {"there"}
    assert len([path for path, ranges in hub.gets() if not ranges]) == 2
    assert (tmp_path / "to" / OWN / DIT).read_bytes() == BIG[OWN, DIT]


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_fetched(hub: Hub, tmp_path: Path, child: Pulling) -> None:
    process = child()
    wait_until(lambda: partials(tmp_path) and partials(tmp_path)[0].stat().st_size > 2 * PIECE - 10_000)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert partials(tmp_path)[0].stat().st_size == 2 * PIECE
