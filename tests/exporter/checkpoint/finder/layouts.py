"""The layouts in which people keep a model's files, made of the files that `wanforge synth` writes."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.exporter.checkpoint.sources import State, spelt
from wanforge.exporter.checkpoint.reader import INDEX
from wanforge.exporter.checkpoint.synth import TEXT_ENCODER_FILE, TOKENIZER_FILE, VAE_FILE

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def link_files(files: dict[str, Path], folder: Path) -> Path:
    """Put files into a folder under other names, as links to where they are."""
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(source.resolve())
    return folder


def published(checkpoint: Path, folder: Path, **renamed: str) -> Path:
    """A folder of published files; ``renamed`` gives new names to denoisers by their stems (``_`` for ``-``), and an
    empty name leaves a file out."""
    names = {f"{old.replace('_', '-')}.pth": new for old, new in renamed.items()}
    files = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
    return link_files({names.get(name, name): path for name, path in files.items() if names.get(name, name)}, folder)


def diffusers(checkpoint: Path, folder: Path, denoisers: dict[str, str], *, sharded: bool = False) -> Path:
    """A pipeline of diffusers; ``denoisers`` gives the published file of each folder."""
    sources = {name: ("dit", file) for name, file in denoisers.items()}
    sources |= {"vae": ("vae", VAE_FILE), "text_encoder": ("text_encoder", TEXT_ENCODER_FILE)}
    for name, (component, file) in sources.items():
        (folder / name).mkdir(parents=True)
        state = spelt(component, torch.load(checkpoint / file, weights_only=True))
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        write_weights(state, folder / name, stem, 3 if sharded and name != "vae" else 1)
        (folder / name / "config.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    shutil.copy(checkpoint / TOKENIZER_FILE, folder / "tokenizer")
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    return folder


def write_weights(state: State, folder: Path, stem: str, shards: int) -> None:
    if shards == 1:
        save_file(state, folder / f"{stem}.safetensors")
        return
    files = {name: f"{stem}-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name] for name, inside in files.items() if inside == file}, folder / file)
    (folder / f"{stem}{INDEX}").write_text(json.dumps({"weight_map": files}))


def hub_repository(files: Path, cache: Path, repository: str, commit: str = COMMIT) -> Path:
    """A repository as huggingface_hub caches it: links in a snapshot to files called after their digests."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(path for path in files.rglob("*") if path.is_file())):
        link = root / "snapshots" / commit / path.relative_to(files)
        blob = root / "blobs" / f"{number:064x}"
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(root).parts) - 1), "blobs", blob.name))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    return root
