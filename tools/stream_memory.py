"""What a long stream takes of memory: the process as a whole, and the arena, as it goes on.

python -m tools.stream_memory BUNDLE --chunks 2000 --memory 1

Run it from the top of a checkout, with a bundle of tiny-causal.
"""

import argparse
import gc
from itertools import islice
from pathlib import Path

import psutil

from wanforge.configs.causal import PolicyName, policy
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends.arena_backend import ArenaBackend
from wanforge.runtime.memory.arena import Arena
from wanforge.runtime.pipeline import open_pipeline
from wanforge.runtime.streaming.live import live

PROMPTS = ("a red kite over a beach", "a longer text about a blue train in the snow", "a cat")


def main() -> None:
    """Make the chunks, and print a line after every tenth of them."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("bundle", type=Path)
    given.add_argument("--chunks", type=int, default=2000)
    given.add_argument("--memory", type=float, help="the budget in gigabytes")
    given.add_argument("--backend", default="ort")
    given.add_argument("--cache", default="infinity_rope")
    options = given.parse_args()
    policy(options.cache)
    budget = None if options.memory is None else options.memory * 1e9
    pipeline = open_pipeline(Bundle.open(options.bundle), options.backend, budget)
    name: PolicyName = options.cache
    print(f"{'chunks':>7} {'resident, MB':>13} {'arena, MB':>10}")
    with live(pipeline, PROMPTS[0], size=(32, 16), seed=7, cache=name) as stream:
        for chunk in islice(stream, options.chunks):
            stream.prompt = PROMPTS[chunk.index // 7 % len(PROMPTS)]
            if (chunk.index + 1) % max(1, options.chunks // 10) == 0:
                gc.collect()
                resident = psutil.Process().memory_info().rss
                arena = arena_bytes(pipeline.backend)
                print(f"{chunk.index + 1:>7} {resident / 1e6:>13.1f} {arena / 1e6:>10.2f}")


def arena_bytes(backend: object) -> int:
    """The bytes of a backend's arena; 0 if it has none."""
    assert isinstance(backend, ArenaBackend)
    return backend.memory.plan.arena_bytes if isinstance(backend.memory, Arena) else 0


if __name__ == "__main__":
    main()
