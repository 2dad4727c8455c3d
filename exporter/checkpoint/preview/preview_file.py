"""Read the files of preview decoders: TAEHV's taew2_1, and LightX2V's lighttaew2_1.

Both hold an encoder as well, which nothing here needs. The widths of the decoder follow from the shapes of its tensors.
Nothing in a file tells which latents it was trained for, so its name does, as in LightX2V.

Source: LightX2V, lightx2v/models/video_encoders/hf/wan/vae_tiny.py; TAEHV, taehv.py (docs/sources.md).
"""

from dataclasses import dataclass
from pathlib import Path

from wanforge.configs.model import PreviewConfig
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.formats.opening import open_weights
from wanforge.exporter.checkpoint.reader import Contents, open_checkpoint
from wanforge.runtime.reference.names import strip_prefix

ENCODER = "encoder."
SCALED = "lighttae"
"""What the names of files contain whose latents are not normalised."""
CHANNELS, PICTURE = 16, 3
"""Channels of the latents and of the pictures."""
FIRST, LAST = "decoder.1.weight", "decoder.22.weight"
WIDTHS = (FIRST, "decoder.8.weight", "decoder.14.weight", "decoder.20.weight")
"""The convolutions that lead to each resolution; their outputs are its channels."""


@dataclass(frozen=True)
class PreviewFile:
    """What a file of a preview decoder holds.

    Attributes:
        left_out: Names of the tensors that are not imported.
    """

    config: PreviewConfig
    left_out: list[str]

    def __str__(self) -> str:
        widths = ", ".join(map(str, self.config.widths))
        return f"{widths} channels, {self.config.latents} latents; {len(self.left_out)} tensors of its encoder left out"


def open_component(component: str, path: Path) -> Contents:
    """The table of contents of a component's file, of a preview decoder's without its encoder.

    Raises:
        CheckpointError: See `open_checkpoint` and `open_weights`.
    """
    if component != "preview":
        return open_weights(path)
    contents = open_checkpoint(path)
    left_out = encoder_of(contents)
    return {name: stored for name, stored in contents.items() if name not in left_out}


def encoder_of(contents: Contents) -> list[str]:
    """The names of the tensors of an encoder."""
    return [stored for name, stored in strip_prefix(contents).items() if name.startswith(ENCODER)]


def read_preview(path: Path) -> PreviewFile:
    """Read what a file says of its decoder.

    Raises:
        CheckpointError: It is no preview decoder, or one for other latents.
    """
    contents = open_checkpoint(path)
    names = strip_prefix(contents)
    shapes = {name: contents[names[name]].spec.shape for name in (*WIDTHS, LAST) if name in names}
    if len(shapes) != len({*WIDTHS, LAST}) or any(len(shape) != 4 for shape in shapes.values()):
        raise CheckpointError(f"{path}: is no preview decoder, whose first layer is {FIRST}; give taew2_1 (--preview)")
    latent, picture = shapes[FIRST][1], shapes[LAST][0]
    if (latent, picture) != (CHANNELS, PICTURE):
        raise CheckpointError(
            f"{path}: decodes latents of {latent} channels to {picture}, and this model's latents of {CHANNELS} "
            f"channels become pictures of {PICTURE}; give taew2_1, which is for Wan2.1 and Wan2.2-A14B (--preview)"
        )
    first, second, third, last = (shapes[name][0] for name in WIDTHS)
    config = PreviewConfig(
        widths=(first, second, third, last), latents="scaled" if SCALED in path.name.lower() else "normalised"
    )
    return PreviewFile(config, encoder_of(contents))
