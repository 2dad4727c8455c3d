"""The files of a folder with a bundle, compared with what they should be."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

BUNDLE = "a bundle"
"""The name of every bundle. It has a space, so that hints that do not quote it fail."""
UNLIKE = {".changes.lock", ".lock", ".manifest.lock", ".verified.json"}
"""Files of a bundle that differ between bundles that are equal."""

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """What is in a folder: SHA-256 of each file, or the target of each link, by path relative to the folder."""

    files: Mapping[str, str]
    manifest: Manifest | None

    @classmethod
    def of(cls, folder: Path) -> "Snapshot":
        found = {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if is_file(path)}
        path = folder / BUNDLE / "manifest.json"
        return cls(found, json.loads(path.read_text()) if path.exists() else None)

    @cached_property
    def bundle(self) -> dict[str, str]:
        """The files of the bundle, by path in it, without those that differ between equal bundles."""
        inside = {
            name.removeprefix(f"{BUNDLE}/"): it for name, it in self.files.items() if name.startswith(f"{BUNDLE}/")
        }
        return {name: it for name, it in inside.items() if name not in UNLIKE}

    @cached_property
    def others(self) -> dict[str, str]:
        """The files beside the bundle."""
        return {name: it for name, it in self.files.items() if not name.startswith(f"{BUNDLE}/")}

    @property
    def records(self) -> dict[str, Any]:
        """The manifest's records by file."""
        return {} if self.manifest is None else dict(self.manifest["files"])

    @property
    def origin(self) -> Any:
        """The model, the recipe and the weights that the manifest names."""
        weights = {name: record["sha256"] for name, record in self.records.items() if name.startswith("weights/")}
        return self.manifest and (self.manifest["model"], self.manifest["recipe"], weights)

    def unlike_its_manifest(self) -> list[str]:
        """The files that differ from what the manifest says."""
        return [
            f"{name} is not as the manifest says"
            for name, record in self.records.items()
            if not record.get("link") and self.bundle.get(name) != record["sha256"]
        ]


def is_file(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def digest(path: Path) -> str:
    return f"link to {os.readlink(path)}" if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(names: Iterable[str]) -> list[str]:
    """The files that only a command that was killed leaves behind."""
    return [f"{name} is left over" for name in names if ".partial" in name or name.endswith(".journal")]


def differences(found: Snapshot, expected: Snapshot) -> list[str]:
    """How a folder differs from another one, in which nothing was disturbed."""
    both = sorted((found.bundle.keys() & expected.bundle.keys()) - {"manifest.json"})
    names = sorted(found.records.keys() | expected.records.keys())
    return [
        *leftovers(found.files),
        *(f"{name} is missing" for name in sorted(expected.bundle.keys() - found.bundle.keys())),
        *(f"{name} is one file too many" for name in sorted(found.bundle.keys() - expected.bundle.keys())),
        *(f"{name} has other bytes" for name in both if found.bundle[name] != expected.bundle[name]),
        *(f"another record of {name}" for name in names if found.records.get(name) != expected.records.get(name)),
        *found.unlike_its_manifest(),
        *([] if found.others == expected.others else [f"beside the bundle: {found.others}, not {expected.others}"]),
    ]


def unsound(found: Snapshot, known: Iterable[Snapshot]) -> list[str]:
    """Why a bundle must not be accepted: bytes that are not those of its manifest, or weights that are neither those
    from before nor those from after."""
    if found.manifest is None:
        return ["there is no manifest"]
    is_known = any(found.origin == each.origin for each in known if each.manifest is not None)
    return [*found.unlike_its_manifest(), *([] if is_known else ["its weights are a mixture, or some are missing"])]
