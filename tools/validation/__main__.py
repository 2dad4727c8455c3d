"""Print the table of docs/kernels.md that compares predictions with what others have measured.

    python -m tools.validation

It compiles each kernel with every tile of its case and predicts its speed; nothing runs.
"""

import os

from tools.validation.cases import CASES, Case, predict
from wanforge.runtime.measure.tables import markdown_table

HEAD = [
    "kernel, compiled here",
    "GPU",
    "tile, warps, stages",
    "stated by",
    "stated, TFLOP/s",
    "predicted",
    "error",
    "bound by",
]


def row(tiles: list[Case]) -> list[str]:
    """A measurement beside the prediction for the fastest of its tiles."""
    found = [
        (case.cost.total_flops / prediction.seconds / 1e12, case, target, prediction)
        for case in tiles
        for target, prediction in [predict(case)]
    ]
    speed, case, target, prediction = max(found, key=lambda each: each[0])
    tile = "x".join(str(case.constants[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in case.constants)
    return [
        case.what,
        target.title,
        f"{tile}, {case.num_warps}, {case.num_stages}",
        case.source,
        f"{case.stated:,.0f}",
        f"{speed:,.0f}",
        f"{speed / case.stated - 1:+.0%}",
        prediction.bound,
    ]


def table() -> str:
    """The table in Markdown."""
    return markdown_table(HEAD, [row(tiles) for tiles in CASES], words=4)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    print(table())
