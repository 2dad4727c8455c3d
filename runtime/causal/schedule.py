"""Which graph of a causal model's denoiser runs when, on which buffers and with which weights."""

from collections.abc import Mapping, Sequence
from itertools import islice

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import dit_component
from wanforge.runtime.causal.kept import RECALL, KeptApart, Recall, recall_of
from wanforge.runtime.graphs import Graph
from wanforge.runtime.reference.causal.chunks import trajectories
from wanforge.runtime.schedule import GraphRun, Ported, Ref, Schedule, ScheduleBuilder, text_schedule, vae_schedule

PREFIXES = {"text": "text.", "denoise": "", "decode": "decode."}
"""What the names of a stage's buffers begin with in a stream."""


def timesteps_of(model: ModelConfig) -> list[float]:
    """What the network of a causal model is ever told of the time: 0 for finished latents first."""
    assert model.causal
    ways = islice(trajectories(model.causal, model.sampler), 2)
    return list(dict.fromkeys([0.0, *(step.timestep for way in ways for step in way.steps)]))


def chunk_schedule(
    model: ModelConfig,
    graphs: Mapping[str, Graph],
    sizes: Mapping[str, int],
    timesteps: Sequence[float],
    kept: KeptApart | None = None,
) -> Schedule:
    """The denoiser of a causal model at chunks of one length.

    Programs: ``prompt`` and ``times`` as in `schedule.denoise_schedule`; ``step.<i>`` computes ``velocity`` and each
    layer's ``own_keys`` and ``own_values`` from ``patches`` at the i-th timestep, and from its ``past_keys`` and
    ``past_values``, which the caller fills. If they are kept elsewhere, all layers share one pair of these, into which
    each layer's are read just before they are needed.

    Args:
        sizes: ``tokens`` of a chunk, ``past_tokens`` that it may see of earlier ones, and ``context_rows``; with
            `kept`, also ``kept_groups``, see `KeptApart.groups`.
        timesteps: What the network is ever told of the time.
        kept: How keys and values are kept elsewhere; None if attention reads them where they are kept.
    """
    read = recall_of(kept, model.dit.dim) if kept else None
    ported: Mapping[str, Ported] = {**graphs, RECALL: read} if read else graphs
    build = ScheduleBuilder(ported, {**sizes, "seen_tokens": sizes["past_tokens"] + sizes["tokens"]})
    dit, layers, stream = dit_component(model.experts[0]), range(model.dit.num_layers), build.stream
    prompt, times, programs = [build.run("context", ["text"], ["context"], dit)], [], {}
    for layer in layers:
        outputs = [f"keys.{layer}", f"values.{layer}"]
        prompt.append(build.run("cross_kv", ["context", "kept_rows"], outputs, dit, f"blocks.{layer}."))
    for index in range(len(timesteps)):
        modulation, head = f"modulation.{index}", f"head_modulation.{index}"
        times.append(build.run("time", [f"sinusoid.{index}"], [modulation, head], dit))
        runs = [build.run("stem", ["patches"], stream(0), dit)]
        for layer in layers:
            (here, *read_too), (there, *written_too) = stream(layer), stream(layer + 1)
            text: list[str | Ref] = [f"keys.{layer}", f"values.{layer}", "key_bias", "cos", "sin"]
            past = [name if read else f"{name}.{layer}" for name in ("past_keys", "past_values")]
            if read:
                runs.append(_recall(build, read, layer))
            inputs = [here, Ref(modulation, layer), *text, *past, "seen_bias", *read_too]
            outputs = [there, f"own_keys.{layer}", f"own_values.{layer}", *written_too]
            runs.append(build.run("chunk_block", inputs, outputs, dit, f"blocks.{layer}."))
        runs.append(build.run("head", [stream(len(layers))[0], head], ["velocity"], dit, "head."))
        programs[f"step.{index}"] = tuple(runs)
    everything = {"prompt": tuple(prompt), "times": tuple(times), **programs}
    return Schedule("denoise", build.buffers, everything, repeats=True)


def _recall(build: ScheduleBuilder, read: Recall, layer: int) -> GraphRun:
    """What reads the keys and values of a layer."""
    names = [port.name for port in read.inputs]
    inputs = [f"{name}.{layer}" if name in read.kept else name for name in names]
    return build.run(RECALL, inputs, [port.name for port in read.outputs], "", f"blocks.{layer}.")


def stream_schedule(
    model: ModelConfig, graphs: Mapping[str, Graph], live: ClipShape, kept: KeptApart | None = None
) -> Schedule:
    """Everything that takes turns while a stream is made, as one stage, because what one turn leaves behind must be
    there at its next: the text encoder, the denoiser, whose past keys and values are the stream's memory, and the
    decoder. A turn runs a smaller schedule on the start of these buffers: `text_schedule` at the length of a prompt,
    `chunk_schedule` at the length of a chunk, `vae_schedule`; see `Session.part`.

    Args:
        live: The shape of a video whose last chunk sees as much as any.
        kept: As in `chunk_schedule`.
    """
    assert model.causal
    area, longest, rows = live.tokens // live.latent_frames, model.causal.longest, model.dit.text_rows
    past = model.causal.past_frames(live.latent_frames)
    sizes = {"tokens": area * longest, "past_tokens": area * past, "context_rows": rows}
    sizes |= {"kept_groups": kept.groups(area * longest)} if kept else {}
    turns = [
        text_schedule(model, graphs, rows),
        chunk_schedule(model, graphs, sizes, timesteps_of(model), kept),
        vae_schedule(graphs, live, "decode"),
    ]
    buffers = {PREFIXES[each.stage] + name: spec for each in turns for name, spec in each.buffers.items()}
    programs = {PREFIXES[each.stage] + name: runs for each in turns for name, runs in each.programs.items()}
    return Schedule("stream", buffers, programs, repeats=True)
