"""What is killed: a command, in a folder that other commands have prepared."""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tests.usage.commands import Ended, run
from tests.usage.folders import BUNDLE, Snapshot
from tests.usage.hints import mend
from tests.usage.moments import Moment
from wanforge.engines.bundle.manifest import FileRecord, read_manifest, write_manifest

Words = tuple[str, ...]

CLIP = ("--prompt", "a red circle moving right", "--frames", "5", "--steps", "2")
TARGETS = ("--target", "rtx5090,rtx4090", "--frames", "5")
FILES = "files"
"""The folder of checkpoint files, beside the folders of the scenarios."""

IMPORT: Words = ("import", "--recipe", "w8a8", "--out", BUNDLE)
EXPORT: Words = ("export", BUNDLE)
BUILD: Words = ("build", BUNDLE, *TARGETS)
GENERATE: Words = ("generate", BUNDLE, *CLIP, "--out", "clip.mp4")
OLD_CLIP: Words = (*GENERATE, "--seed", "7")


def files_of(model: str, names: dict[str, str]) -> Words:
    """The options that give an import the files of a model, in the folder beside its own."""
    options = [part for option, name in names.items() for part in (f"--{option}", f"../{FILES}/{model}/{name}")]
    return ("--model", model, *options)


COMMON = {
    "vae": "Wan2.1_VAE.pth",
    "text-encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "tokenizer": "google/umt5-xxl",
}
T2V: Words = files_of("tiny-t2v", {"dit": "tiny-t2v-quant.pth", **COMMON})
I2V: Words = files_of("tiny-i2v", {"dit": "tiny-i2v-high.pth", "dit-low": "tiny-i2v-low.pth", **COMMON})
PLAIN = f"../{FILES}/plain"
"""A bundle whose weights can be linked."""
INTERRUPTED: Words = ("import", *I2V, "--recipe", "w8a8", "--out", BUNDLE)
LINKED: Words = (
    *("--dit", f"{PLAIN}/weights/dit.safetensors", "--vae", f"{PLAIN}/weights/vae.safetensors"),
    *("--text-encoder", f"{PLAIN}/weights/text_encoder.safetensors", "--tokenizer", f"{PLAIN}/tokenizer"),
    "--link",
)


def damage(folder: Path) -> None:
    """Change a byte in two of the weights files."""
    for name in ("dit", "vae"):
        with (folder / BUNDLE / f"weights/{name}.safetensors").open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            byte = file.read(1)
            file.seek(-100, os.SEEK_END)
            file.write(bytes([byte[0] ^ 64]))


def delete(folder: Path) -> None:
    """Delete a weights file."""
    (folder / BUNDLE / "weights/vae.safetensors").unlink()


def interrupt(folder: Path) -> None:
    """Kill an import of another model half-way."""
    run(INTERRUPTED, folder, moment=Moment(step="file", count=40))


def age(folder: Path) -> None:
    """Make all graphs and engines look as if another version of the code had made them."""

    def aged(record: FileRecord) -> FileRecord:
        return msgspec.structs.replace(
            record, key={k: "old" if k in ("code", "flags") else v for k, v in record.key.items()}
        )

    manifest = read_manifest(folder / BUNDLE)
    files = {name: aged(record) for name, record in manifest.files.items()}
    write_manifest(folder / BUNDLE, msgspec.structs.replace(manifest, files=files))


Step = Words | Callable[[Path], None]

STARTS: dict[str, list[Step]] = {
    "nothing": [],
    "imported": [IMPORT],
    "exported": [IMPORT, EXPORT],
    "complete": [IMPORT, EXPORT, BUILD, OLD_CLIP],
    "damaged": [IMPORT, EXPORT, BUILD, damage],
    "lacking": [IMPORT, EXPORT, BUILD, delete],
    "old": [IMPORT, EXPORT, BUILD, age],
    "old graphs": [IMPORT, EXPORT, age],
    "interrupted": [interrupt],
    "linked": [("import", *LINKED, "--out", BUNDLE), EXPORT],
}
"""How a folder is prepared, by name."""


@dataclass
class Scenario:
    """A command in a prepared folder, and what it does when nothing disturbs it.

    Attributes:
        before: The folder before the command.
        mended: The folder if all hints are followed in place of the command.
        after: The folder when the command has ended, all hints are followed, and it has run once more.
    """

    name: str
    start: str
    words: Words
    before: Snapshot = field(default_factory=lambda: Snapshot({}, None))
    mended: Snapshot = field(default_factory=lambda: Snapshot({}, None))
    after: Snapshot = field(default_factory=lambda: Snapshot({}, None))
    seconds: float = 0.0
    steps: Counter[str] = field(default_factory=Counter)

    @property
    def sound(self) -> tuple[Snapshot, ...]:
        """The folders whose bundles are whole."""
        return self.before, self.mended, self.after

    @property
    def makes_clips(self) -> bool:
        """Whether `CLIP` fits every model that the bundle may have."""
        return "tiny-i2v" not in self.words


def scenarios() -> list[Scenario]:
    """Everything that is killed."""
    replacing, other = ("--replace", "--out", BUNDLE), ("import", "--recipe", "w8a8-row")
    return [
        Scenario("import", "nothing", IMPORT),
        Scenario("import, not quantised", "nothing", ("import", "--out", BUNDLE)),
        Scenario("import .pth, quantised", "nothing", ("import", *T2V, "--out", BUNDLE)),
        Scenario("import .pth, two experts", "nothing", INTERRUPTED),
        Scenario("import --link", "nothing", ("import", *LINKED, "--out", BUNDLE)),
        Scenario("import --replace", "complete", (*IMPORT, "--replace")),
        Scenario("import --replace, other recipe", "complete", (*other, *replacing)),
        Scenario("import --replace, other model", "complete", ("import", *I2V, *replacing)),
        Scenario("import --replace of an import", "interrupted", (*IMPORT, "--replace")),
        Scenario("import --replace --link", "complete", ("import", *LINKED, *replacing)),
        Scenario("import --replace of links", "linked", ("import", *replacing)),
        Scenario("import --resume", "damaged", ("import", "--resume", BUNDLE)),
        Scenario("import --resume, file missing", "lacking", ("import", "--resume", BUNDLE)),
        Scenario("import --resume, nothing to do", "complete", ("import", "--resume", BUNDLE)),
        Scenario("export", "imported", EXPORT),
        Scenario("export, graphs are old", "old", EXPORT),
        Scenario("export, nothing to do", "complete", EXPORT),
        Scenario("build", "exported", BUILD),
        Scenario("build, other clip", "complete", (*BUILD[:-1], "9")),
        Scenario("generate", "exported", GENERATE),
        Scenario("generate over a clip", "complete", GENERATE),
    ]


def prepare(folder: Path, wanted: list[Scenario]) -> None:
    """Make the folders that scenarios start from, and find out what each command does when nothing disturbs it."""
    given = {
        word for scenario in wanted for word in (*scenario.words, *INTERRUPTED * (scenario.start == "interrupted"))
    }
    for model in given & {"tiny-t2v", "tiny-i2v"}:
        must_succeed(run(("synth", "--model", model, "--out", f"{FILES}/{model}"), folder))
    must_succeed(run(("import", "--out", f"{FILES}/plain"), folder))
    for start in dict.fromkeys(scenario.start for scenario in wanted):
        (folder / start).mkdir()
        for step in STARTS[start]:
            perform(step, folder / start)
    whole = {start: mended(folder, start) for start in STARTS if (folder / start).exists()}
    for scenario in wanted:
        scenario.mended = whole[scenario.start]
        undisturbed = begin(folder, scenario, f"undisturbed {scenario.name}")
        scenario.before = Snapshot.of(undisturbed)
        ended = must_succeed(run(scenario.words, undisturbed, record=True))
        scenario.seconds, scenario.steps = ended.seconds, ended.steps
        *_, last = mend(undisturbed)
        must_succeed(last)
        scenario.after = Snapshot.of(undisturbed)
        shutil.rmtree(undisturbed)


def mended(folder: Path, start: str) -> Snapshot:
    """A folder of this start in which all hints are followed."""
    place = Path(shutil.copytree(folder / start, folder / f"mended {start}", symlinks=True))
    for _ in mend(place):
        pass
    found = Snapshot.of(place)
    shutil.rmtree(place)
    return found


def perform(step: Step, folder: Path) -> None:
    """Do a step of the preparation of a folder."""
    if callable(step):
        step(folder)
    else:
        must_succeed(run(step, folder))


def begin(folder: Path, scenario: Scenario, name: str) -> Path:
    """A folder of its own to run a scenario in."""
    return Path(shutil.copytree(folder / scenario.start, folder / name, symlinks=True))


def must_succeed(ended: Ended) -> Ended:
    """Refuse to go on from a command that failed although nothing disturbed it."""
    if ended.code:
        raise RuntimeError(f"`{ended}` exited with {ended.code}: {ended.output}")
    return ended
