"""The inputs and outputs of the models, from which their configuration is written and requests are read."""

from dataclasses import dataclass

from wanforge.configs.model import ModelConfig


@dataclass(frozen=True)
class TensorEntry:
    """An input or an output.

    Attributes:
        kind: Its type, as the configuration of a model calls it.
        dims: Its shape; -1 stands for any length.
        meaning: What it holds, for people.
        is_optional: Whether a request may leave it out, or a response may lack it.
    """

    name: str
    kind: str
    dims: tuple[int, ...]
    meaning: str
    is_optional: bool = True


@dataclass(frozen=True)
class TensorTable:
    """All inputs and outputs of a model."""

    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


PROMPT = TensorEntry("PROMPT", "TYPE_STRING", (1,), "what the clip shows, in English", is_optional=False)
IMAGE = TensorEntry("IMAGE", "TYPE_STRING", (1,), "the bytes of a picture file, the first frame", is_optional=False)
SHAPE = (
    TensorEntry("SIZE", "TYPE_STRING", (1,), "832x480, or a name such as 480p; the model's own by default"),
    TensorEntry("FRAMES", "TYPE_INT32", (1,), "number of frames, 4n+1; the model's own by default"),
)
SAMPLING = (
    TensorEntry("SEED", "TYPE_UINT64", (1,), "seed of the noise; 0 by default"),
    TensorEntry("STEPS", "TYPE_INT32", (1,), "number of steps; the model's own by default"),
    TensorEntry("TOPK", "TYPE_FP64", (1,), "share of the key blocks that attention sees; the model's own by default"),
)
STREAM = TensorEntry("STREAM", "TYPE_STRING", (-1,), "progress, frames or both, to be sent while the clip is made")
BASE64 = TensorEntry("BASE64", "TYPE_BOOL", (1,), "whether IMAGE and VIDEO are text in Base64, for clients of HTTP")

PROGRESS = (
    TensorEntry("STAGE", "TYPE_STRING", (1,), "what is being done"),
    TensorEntry("PERCENT", "TYPE_INT32", (1,), "how much of the clip is done"),
)
FRAME = (
    TensorEntry("FRAME", "TYPE_UINT8", (-1, -1, 3), "a frame, height by width by red, green and blue"),
    TensorEntry("FRAME_INDEX", "TYPE_INT32", (1,), "which frame it is, from 0"),
)
VIDEO = (
    TensorEntry("VIDEO", "TYPE_STRING", (1,), "the bytes of an mp4 file"),
    TensorEntry("REPORT", "TYPE_STRING", (1,), "what was made, and the seconds that it took, as JSON"),
)


def clip_tensors(model: ModelConfig) -> TensorTable:
    """The tensors of a model that makes a whole clip."""
    image = (IMAGE,) if model.task == "i2v" else ()
    return TensorTable((PROMPT, *image, *SHAPE, *SAMPLING, STREAM, BASE64), (*PROGRESS, *FRAME, *VIDEO))


EMBEDDING = TensorEntry("EMBEDDING", "TYPE_FP32", (-1, -1), "the embedded prompt, tokens by channels")
CONDITION = TensorEntry("CONDITION", "TYPE_FP32", (1, -1, -1, -1, -1), "what the denoiser is told of a picture")
LATENTS = TensorEntry("LATENTS", "TYPE_FP64", (1, -1, -1, -1, -1), "the clean latents of the clip")


def stage_tensors(model: ModelConfig, stage: str) -> TensorTable:
    """The tensors of a model that runs a stage: ``text``, ``denoiser`` or ``vae``."""
    whole = clip_tensors(model)
    condition = (CONDITION,) if model.task == "i2v" else ()
    report = VIDEO[1]
    if stage == "text":
        return TensorTable(whole.inputs, (*PROGRESS, EMBEDDING, report))
    if stage == "denoiser":
        return TensorTable((*whole.inputs, EMBEDDING, *condition), (*PROGRESS, LATENTS, report))
    return TensorTable((*whole.inputs, LATENTS), (*PROGRESS, *FRAME, *condition, *VIDEO))
