"""The predicted time of a block with products of low rank beside its linears, relative to one without, in Markdown.

python -m tools.lora.side_path_time
"""

from dataclasses import replace

from wanforge.configs.targets import Target, load_targets
from wanforge.runtime.measure.cost.fused import fused_block
from wanforge.runtime.measure.cost.launches import USUAL_TEXT_ROWS, all_launches, published_workload
from wanforge.runtime.measure.cost.prediction import predicted_seconds
from wanforge.runtime.measure.tables import markdown_table

MODELS = ("turbowan2.1-t2v-14b-720p", "turbowan2.1-t2v-1.3b-480p")
RANKS = (16, 64, 128)
GPUS = ("rtx4090", "rtx5090", "h100")


def ratio(model: str, rank: int, gpu: Target) -> float:
    """The time of a block with products of this rank, relative to one without."""
    plain = published_workload(model, text_rows=USUAL_TEXT_ROWS)
    beside, base = (
        predicted_seconds(all_launches(fused_block(w)), gpu) for w in (replace(plain, side_rank=rank), plain)
    )
    return beside / base


def main() -> None:
    gpus = [load_targets()[name] for name in GPUS]
    rows = [[m, str(rank), *(f"{ratio(m, rank, gpu):.2f}" for gpu in gpus)] for m in MODELS for rank in RANKS]
    print(markdown_table(["model", "rank", *(gpu.title for gpu in gpus)], rows))


if __name__ == "__main__":
    main()
