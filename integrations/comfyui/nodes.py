"""The nodes: what they are called, what they take, and what they do."""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from . import local
from .connection import FIRST_PATIENCE, connected, nothing
from .definition import MODEL, SETTINGS, Input, Node, Output
from .errors import NodeError
from .host import Host
from .making import interruptible, make
from .places import DEFAULT, url_of

LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class Model:
    """What goes along a wire: a model of a server, without any key.

    Attributes:
        bundle: The folder of the bundle, if this ComfyUI runs the server for it.
        description: What the server says of the model.
    """

    url: str
    description: Mapping[str, Any]
    bundle: str = ""
    lora: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """What a request says of it."""
        found = {"model": self.description["id"], "recipe": self.description["recipe"]}
        return {**found, "lora": self.lora} if self.lora else found


async def load_from_server(host: Host, url: str = "", model: str = "", recipe: str = "") -> tuple[Model, str]:
    place = url_of(url)
    found = await interruptible(host, described(place, model, recipe))
    return Model(place, found), about(found)


def about(model: Mapping[str, Any]) -> str:
    """What the server says of a model, for people."""
    task = {"t2v": "text to video", "i2v": "image to video"}.get(model["task"], model["task"])
    return (
        f"{model['id']}, {task}, recipe {model['recipe']}\n"
        f"{model['size']}, {model['frames']} frames at {model['fps']} a second, {model['steps']} steps\n"
        f"attention: {model['topk'] or 'all key blocks'}\n"
        f"LoRAs: {', '.join(model['loras']) or 'none'}\n"
        f"usual sizes: {', '.join(model['sizes'])}"
    )


async def described(url: str, name: str, recipe: str, patience: float = FIRST_PATIENCE) -> dict[str, Any]:
    """What a server says of a model.

    Raises:
        NodeError: It has none of this name or recipe, or is not there.
    """
    async with connected(url, patience=patience) as server:
        models = await server.models()
    named = [each for each in models if name.strip() in ("", each["id"])]
    if not named:
        raise NodeError(f"model: {url} has no {name!r}; it has {listed(models, 'id')}")
    found = [each for each in named if recipe.strip() in ("", each["recipe"])]
    if not found:
        raise NodeError(f"recipe: {url} has none called {recipe!r} here; there is {listed(named, 'recipe')}")
    return found[0]


def listed(models: list[dict[str, Any]], key: str) -> str:
    return ", ".join(sorted({str(each[key]) for each in models}))


async def state_of_server(url: str | None = "", model: str | None = "", recipe: str | None = "") -> str:
    """Changes if the server has another model under a name than before, and not because it was started again.

    While the server is away it is as it was, so that what was made with it stays.
    """
    asked = (url or "", model or "", recipe or "")
    try:
        found = await described(url_of(url), asked[1], asked[2], patience=0)
    except NodeError as error:
        return known.get(asked, str(error))
    known[asked] = digest({name: value for name, value in found.items() if name != "created"})
    return known[asked]


known: dict[tuple[str, str, str], str] = {}
"""The latest state of each model that was asked for."""


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


async def load_from_folder(host: Host, folder: str) -> tuple[Model, str]:
    """Serve a bundle in a process of its own, and connect to it."""
    server = await interruptible(host, local.serving(folder))
    found = await interruptible(host, described(server.url, "", ""))
    return Model(server.url, found, bundle=server.folder), about(found)


async def state_of_folder(folder: str | None) -> str:
    return local.state(folder or "")


async def choose_lora(host: Host, model: Model, name: str) -> tuple[Model]:
    loras = list(model.description.get("loras", []))
    if name.strip() and name.strip() not in loras:
        offered = ", ".join(loras) or "none; the settings of wanforge serve name them"
        raise NodeError(f"name: {model.description['id']} has no LoRA called {name!r}; it has {offered}")
    return (replace(model, lora=name.strip()),)


async def choose_settings(host: Host, **settings: Any) -> tuple[dict[str, Any]]:
    """The fields of a request that are not left to the model."""
    width, height = settings.get("width", 0), settings.get("height", 0)
    if bool(width) != bool(height):
        raise NodeError("width and height: give both, or 0 for both, which is the model's own size")
    if settings.get("frames") and settings.get("seconds"):
        raise NodeError("frames and seconds: leave one of them at 0, since each gives the length of the clip")
    chosen = {name: settings.get(name) for name in ("frames", "seconds", "steps")}
    chosen["size"] = f"{width}x{height}" if width else None
    chosen["topk"] = settings.get("attention")
    return ({name: value for name, value in chosen.items() if value},)


async def make_from_text(
    host: Host, model: Model, prompt: str, seed: int, settings: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    if model.description["task"] != "t2v":
        raise NodeError(f"model: {model.description['id']} starts from a picture; use the node Image to Video")
    return await made(host, model, {**(settings or {}), "prompt": prompt, "seed": seed})


async def make_from_image(
    host: Host, model: Model, image: Any, prompt: str, seed: int, settings: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    if model.description["task"] != "i2v":
        raise NodeError(f"model: {model.description['id']} takes no picture; use the node Text to Video")
    return await made(host, model, {**(settings or {}), "prompt": prompt, "seed": seed}, png(image))


async def made(host: Host, model: Model, fields: Mapping[str, Any], picture: bytes | None = None) -> tuple[Any, Any]:
    """The frames of a clip, float ``[B, H, W, C]`` from 0 to 1, and its video."""
    if not str(fields["prompt"]).strip():
        raise NodeError("prompt: say what the clip shows")
    url, check = await interruptible(host, address(model))
    async with connected(url, check) as server:
        video = host.video(await interruptible(host, make(host, server, {**model.fields, **fields}, picture)))
    return video.get_components().images, video


async def address(model: Model) -> tuple[str, Any]:
    """Where a model's server is, and what tells that it will not come back."""
    if not model.bundle:
        return model.url, nothing
    server = await local.serving(model.bundle)  # which may have ended since, and have another address
    return server.url, server.check


def png(image_BHWC: Any) -> bytes:
    """The first picture of an IMAGE as a file."""
    pixels = (image_BHWC[0, ..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


PIXELS = {"default": 0, "min": 0, "max": 8192, "step": 16}
MODEL_OUTPUT = Output("model", MODEL, "A model, for the nodes of wanforge that make videos.")
ABOUT_OUTPUT = Output("about", "STRING", "Size, length, steps and LoRAs of the model, as text; for Preview Any.")
PROMPT = Input(
    "prompt",
    "STRING",
    "What the clip shows, in English. These models know no negative prompt.",
    options={"multiline": True, "default": "", "dynamic_prompts": True},
)
SEED = Input(
    "seed",
    "INT",
    "The same seed with the same inputs makes the same clip. As long as it stays fixed, nothing is made again.",
    options={"default": 0, "min": 0, "max": LARGEST_SEED, "control_after_generate": True},
)
CHOSEN = Input("settings", SETTINGS, "Size, length and steps; without it they are the model's own.", optional=True)
CLIP = (
    Output("images", "IMAGE", "The frames, as the mp4 has them."),
    Output("video", "VIDEO", "The mp4 as the server made it, with its frame rate; for Save Video."),
)

NODES = (
    Node(
        id="WanforgeServerModel",
        title="Wanforge Load Model from Server",
        description="A model of a running `wanforge serve`. Its API key comes from WANFORGE_API_KEY, never from here.",
        inputs=(
            Input(
                "url",
                "STRING",
                f"Address of the server. If it is empty, it is WANFORGE_URL, or else {DEFAULT}.",
                options={"default": "", "placeholder": DEFAULT},
            ),
            Input(
                "model",
                "STRING",
                "Name of a model that the server has. If it is empty, it is the server's first.",
                optional=True,
                options={"default": "", "placeholder": "the server's first"},
            ),
            Input(
                "recipe",
                "STRING",
                "Number formats and attention, such as w8a8, if the server has the model in several.",
                optional=True,
                options={"default": "", "placeholder": "the server's first"},
            ),
        ),
        outputs=(MODEL_OUTPUT, ABOUT_OUTPUT),
        run=load_from_server,
        fingerprint=state_of_server,
    ),
    Node(
        id="WanforgeBundleModel",
        title="Wanforge Load Model from Folder",
        description="A bundle on this machine. The installed wanforge serves it in a process of its own, which ends "
        "with ComfyUI.",
        inputs=(
            Input(
                "folder",
                "STRING",
                "Folder that `wanforge import --out` has made.",
                options={"default": "", "placeholder": "/models/turbowan"},
            ),
        ),
        outputs=(MODEL_OUTPUT, ABOUT_OUTPUT),
        run=load_from_folder,
        fingerprint=state_of_folder,
    ),
    Node(
        id="WanforgeLora",
        title="Wanforge Choose LoRA",
        description="The model with a LoRA, or a set of them, that the server's settings name for it.",
        inputs=(
            Input("model", MODEL, "The model. A LoRA that it has already is replaced."),
            Input("name", "STRING", "Name of a LoRA in the settings of the server.", options={"default": ""}),
        ),
        outputs=(MODEL_OUTPUT,),
        run=choose_lora,
    ),
    Node(
        id="WanforgeSettings",
        title="Wanforge Settings",
        description="Size, length and steps of a clip. Whatever is 0 is the model's own.",
        inputs=(
            Input("width", "INT", "Pixels; 0 for the model's own size.", options=PIXELS),
            Input("height", "INT", "Pixels; 0 for the model's own size.", options=PIXELS),
            Input(
                "frames",
                "INT",
                "Length in frames, 4n+1 such as 81; 0 for the model's own length, or for that of seconds.",
                options={"default": 0, "min": 0, "max": 1025},
            ),
            Input(
                "seconds",
                "FLOAT",
                "Length in seconds, from which follows the nearest number of frames; 0 if frames gives it.",
                options={"default": 0.0, "min": 0.0, "max": 120.0, "step": 0.25},
            ),
            Input(
                "steps",
                "INT",
                "Steps of the sampler; 0 for the model's own. The models are distilled for 1 to 4.",
                options={"default": 0, "min": 0, "max": 16},
            ),
            Input(
                "attention",
                "FLOAT",
                "Share of the key blocks that sparse attention sees (topk); 0 for the model's own.",
                options={"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01},
            ),
        ),
        outputs=(Output("settings", SETTINGS, "Settings, for the nodes of wanforge that make videos."),),
        run=choose_settings,
    ),
    Node(
        id="WanforgeTextToVideo",
        title="Wanforge Text to Video",
        description="Makes a clip from a prompt.",
        inputs=(Input("model", MODEL, "A text-to-video model."), PROMPT, SEED, CHOSEN),
        outputs=CLIP,
        run=make_from_text,
    ),
    Node(
        id="WanforgeImageToVideo",
        title="Wanforge Image to Video",
        description="Makes a clip that begins with a picture.",
        inputs=(
            Input("model", MODEL, "An image-to-video model."),
            Input(
                "image", "IMAGE", "The first frame, cut to the clip's shape. Of several pictures, the first is taken."
            ),
            PROMPT,
            SEED,
            CHOSEN,
        ),
        outputs=CLIP,
        run=make_from_image,
    ),
)
"""All nodes, in the order of the menu."""
