"""The parts in the order of their worth, and the time that each may take."""

from collections.abc import Mapping
from dataclasses import dataclass, field

SMALL, LARGE = "turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p"
SWEPT = (
    *("w8a8_linear", "sparse_linear_attention", "dense_attention", "layer_norm", "rms_norm_rope", "gated_residual"),
    *("channel_norm", "int8_convolution", "recall"),
)
"""The ops whose tiles are swept, those with the most to gain first."""


@dataclass(frozen=True)
class Part:
    """Something to find out, in a process of its own.

    Attributes:
        title: What it finds out, as the page says it.
        function: The module that does it, and the function.
        seconds: The most that it may take.
        least: The fewest seconds that are worth starting it for.
        options: What it is about.
    """

    name: str
    title: str
    function: str
    seconds: int
    least: int
    options: Mapping[str, str] = field(default_factory=dict)


def _of_model(prefix: str, model: str) -> list[Part]:
    size, about = ("1.3b", "1.3B") if model == SMALL else ("14b", "14B")
    given = {"model": model}
    times = {"1.3b": (150, 240, 120), "14b": (180, 300, 180)}[size]
    return {
        "ops": [Part(f"ops-{size}", f"Ops of the {about}", "tools.gpu_day.ops:run", times[0], 45, given)],
        "request": [
            Part(
                f"request-{size}", f"Whole requests of the {about}", "tools.gpu_day.requests:run", times[1], 60, given
            ),
            Part(
                f"profile-{size}", f"Profile of the {about}", "tools.gpu_day.requests:run_profile", times[2], 45, given
            ),
        ],
    }[prefix]


PARTS = [
    Part("machine", "The machine", "tools.gpu_day.machine:run", 60, 10, {"model": SMALL}),
    Part("kernels", "Cubins", "tools.gpu_day.kernels:run", 150, 20, {"model": SMALL}),
    Part("tests", "Tests of the kernels", "tools.gpu_day.device_tests:run", 240, 45, {"model": SMALL}),
    *_of_model("ops", SMALL),
    *_of_model("request", SMALL),
    *_of_model("ops", LARGE),
    *_of_model("request", LARGE),
    *(
        Part(f"sweep-{op}", f"Tiles of {op}", "tools.gpu_day.sweep:run", 150, 40, {"model": SMALL, "op": op})
        for op in SWEPT
    ),
    Part("vae", "Variants of the VAE", "tools.gpu_day.vae:run", 120, 40, {"model": SMALL}),
    Part("parity", "Parity of TinyWan", "tools.gpu_day.parity:run", 180, 40, {"model": "tinywan"}),
    Part("baselines", "Baselines of PyTorch's compiler", "tools.gpu_day.ops:run_baselines", 240, 60, {"model": SMALL}),
]
"""Every part. `kernels` goes before whatever launches any."""


def rehearsed() -> list[Part]:
    """The parts of a rehearsal, in which all models are one: those that do what no part before them does."""
    done: dict[tuple[str, str | None], Part] = {}
    for part in PARTS:
        done.setdefault((part.function, part.options.get("op")), part)
    return list(done.values())
