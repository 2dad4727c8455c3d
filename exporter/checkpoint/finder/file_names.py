"""What the names of files and of their folders say about what the files hold.

Source: TurboDiffusion, README.md; Wan2.1 and Wan2.2, README.md; diffusers, the folders of its pipelines
(docs/sources.md).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wanforge.configs.loading import named
from wanforge.configs.model import ModelConfig, load_model
from wanforge.exporter.checkpoint.checks import EXPERT_FOLDERS, KINDS
from wanforge.exporter.checkpoint.finder.listing import CONTAINERS
from wanforge.exporter.checkpoint.reader import INDEX
from wanforge.exporter.checkpoint.synth import TEXT_ENCODER_FILE, VAE_FILE

DENOISER, VAE, TEXT_ENCODER, PREVIEW = "a denoiser", KINDS["vae"], KINDS["text_encoder"], KINDS["preview"]
FOREIGN = "no part of a model"
BY_NAME, BY_FOLDER = "by its published name", "by its folder"

FOLDERS = {**dict.fromkeys(EXPERT_FOLDERS, DENOISER), "vae": VAE, "text_encoder": TEXT_ENCODER}
"""What the folders of published repositories hold."""
FOREIGN_FOLDERS = {"image_encoder", "clip_vision", "loras", "controlnet"}
FOREIGN_WORDS = {"lora", "loras", "clip", "controlnet"}
"""Folders, and words in names of files, of networks that are not imported."""
NEAREST = 4
"""How many of the folders that a file lies in count. In the cache of huggingface_hub the fourth is the repository of a
file in ``transformer``."""


@dataclass(frozen=True)
class PublishedName:
    """What the name of a published denoiser stands for."""

    model: str
    expert: str
    is_quantised: bool


PublishedNames = Mapping[str, PublishedName]


def published_names(model: ModelConfig | None) -> PublishedNames:
    """The names of the published denoisers, as `stem_of` gives them, of every known model and of `model`."""
    names = {}
    for each in (*map(load_model, named("models")), *([model] if model else [])):
        for expert in each.experts:
            stem = each.stem(expert).lower()
            names[stem] = PublishedName(each.name, expert, is_quantised=False)
            names[f"{stem}-quant"] = PublishedName(each.name, expert, is_quantised=True)
    return names


def stem_of(path: Path | str) -> str:
    """The name of a checkpoint file in lower case and without its ending."""
    name = Path(path).name.lower()
    ending = next((ending for ending in (INDEX, *CONTAINERS) if name.endswith(ending)), "")
    return name.removesuffix(ending)


PREVIEWS = ("lighttaew2_1", "taew2_1")
"""The names of the published preview decoders for the latents of these models, in the order in which they are taken:
LightX2V's, which `wanforge pull` fetches, and TAEHV's."""
SUPPORT = {stem_of(VAE_FILE): VAE, stem_of(TEXT_ENCODER_FILE): TEXT_ENCODER, **dict.fromkeys(PREVIEWS, PREVIEW)}


def kind_by_name(path: Path, published: PublishedNames) -> tuple[str | None, str]:
    """What a file holds according to its name, and what says so; None if nothing does."""
    stem, folder = stem_of(path), path.absolute().parent.name.lower()
    if stem in published or stem in SUPPORT:
        return SUPPORT.get(stem, DENOISER), BY_NAME
    if folder in FOREIGN_FOLDERS or FOREIGN_WORDS & set(re.split(r"[^a-z0-9]+", stem)):
        return FOREIGN, ""
    if folder in FOLDERS:
        return FOLDERS[folder], BY_FOLDER
    return None, ""


def model_by_name(path: Path, models: Sequence[str]) -> list[str]:
    """Those of `models` that the file's name or its nearest folders mention by what tells them apart; or all."""
    shared = set.intersection(*(set(model.split("-")) for model in models)) if models else set()
    for part in _nearest(path):
        mentioned = [model for model in models if any(word in part for word in set(model.split("-")) - shared)]
        if len(mentioned) == 1:
            return mentioned
    return list(models)


def _nearest(path: Path) -> list[str]:
    """The stem of a file and the names of its nearest folders, in lower case and outwards."""
    return [stem_of(path), *(folder.name.lower() for folder in list(path.absolute().parents)[:NEAREST])]
