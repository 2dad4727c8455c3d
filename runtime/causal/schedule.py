"""Which graph of a causal model's denoiser runs when, on which buffers and with which weights."""

from collections.abc import Mapping, Sequence

from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import dit_component
from wanforge.runtime.graphs import Graph
from wanforge.runtime.schedule import Ref, Schedule, ScheduleBuilder


def chunk_schedule(
    model: ModelConfig, graphs: Mapping[str, Graph], sizes: Mapping[str, int], timesteps: Sequence[float]
) -> Schedule:
    """The denoiser of a causal model at chunks of one length.

    Programs: ``prompt`` and ``times`` as in `schedule.denoise_schedule`; ``step.<i>`` computes ``velocity`` and each
    layer's ``own_keys`` and ``own_values`` from ``patches`` at the i-th timestep, and from its ``past_keys`` and
    ``past_values``, which the caller fills.

    Args:
        sizes: ``tokens`` of a chunk, ``past_tokens`` that it may see of earlier ones, and ``context_rows``.
        timesteps: What the network is ever told of the time.
    """
    build = ScheduleBuilder(graphs, {**sizes, "seen_tokens": sizes["past_tokens"] + sizes["tokens"]})
    dit, layers = dit_component(model.experts[0]), range(model.dit.num_layers)
    prompt, times, programs = [build.run("context", ["text"], ["context"], dit)], [], {}
    for layer in layers:
        outputs = [f"keys.{layer}", f"values.{layer}"]
        prompt.append(build.run("cross_kv", ["context", "kept_rows"], outputs, dit, f"blocks.{layer}."))
    for index in range(len(timesteps)):
        modulation, head = f"modulation.{index}", f"head_modulation.{index}"
        times.append(build.run("time", [f"sinusoid.{index}"], [modulation, head], dit))
        runs = [build.run("stem", ["patches"], ["hidden.0"], dit)]
        for layer in layers:
            here, there = f"hidden.{layer % 2}", f"hidden.{(layer + 1) % 2}"
            text: list[str | Ref] = [f"keys.{layer}", f"values.{layer}", "key_bias", "cos", "sin"]
            inputs = [here, Ref(modulation, layer), *text, f"past_keys.{layer}", f"past_values.{layer}", "seen_bias"]
            outputs = [there, f"own_keys.{layer}", f"own_values.{layer}"]
            runs.append(build.run("chunk_block", inputs, outputs, dit, f"blocks.{layer}."))
        runs.append(build.run("head", [f"hidden.{len(layers) % 2}", head], ["velocity"], dit, "head."))
        programs[f"step.{index}"] = tuple(runs)
    return Schedule("denoise", build.buffers, {"prompt": tuple(prompt), "times": tuple(times), **programs})
