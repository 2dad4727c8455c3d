"""The commands of build time: synth, import, export, inspect."""

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import click

from wanforge.configs.loading import named
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle, dit_component
from wanforge.engines.files import built_clips
from wanforge.engines.inspection import describe, inspect_bundle
from wanforge.errors import CheckpointError, ConfigError, WanforgeError, join_names
from wanforge.exporter.checkpoint.embedded import EMBEDDED, embedded
from wanforge.exporter.checkpoint.importer import Sources, import_checkpoint
from wanforge.exporter.checkpoint.synth import file_names, write_checkpoint
from wanforge.exporter.export import DTYPES
from wanforge.exporter.export import export as export_bundle
from wanforge.exporter.graph_key import graph_key
from wanforge.runtime.measure.cost.memory import gpus_of, report, table
from wanforge.runtime.progress import Bars

FOLDER = click.Path(file_okay=False, path_type=Path)
PATH = click.Path(path_type=Path)
MODEL_HELP = f"One of {', '.join(named('models'))}, or a .toml file."


@click.command()
@click.option("--model", required=True, help=MODEL_HELP)
@click.option("--out", required=True, type=FOLDER, help="Directory to write into.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    help="Only this file: dit, dit-quant, vae, text_encoder, tokenizer; repeatable.",
)
@click.option("--sparse", is_flag=True, help="Full-size files of zeros that take no disk space.")
@click.option("--seed", default=0, show_default=True, help="Of the random weights.")
def synth(model: str, out: Path, parts: tuple[str, ...], sparse: bool, seed: int) -> None:
    """Write checkpoint files in the formats that upstream publishes, with random weights.

    The names are the published ones, the -quant files hold the same weights quantised.
    """
    config = load_model(model)
    names = file_names(config)
    wanted = {name for name in names if not parts or name in parts or _family(name) in parts}
    if unknown := [part for part in parts if part not in names and part not in map(_family, names)]:
        raise ConfigError(f"{config.name} has no part {', '.join(unknown)}; known: {', '.join(names)}")
    with Bars() as bars:
        for path in write_checkpoint(config, out, parts=wanted, sparse=sparse, seed=seed, progress=bars.bytes_of):
            click.echo(path)


def _family(part: str) -> str:
    """``dit`` of ``dit.high``, ``dit-quant`` of ``dit.low-quant``."""
    return part.replace(".high", "").replace(".low", "")


@click.command("import")
@click.option("--model", default=EMBEDDED, show_default=True, help=MODEL_HELP)
@click.option(
    "--dit",
    type=PATH,
    help="Denoiser: .pth, .safetensors, sharded index or its directory; the high-noise expert of two.",
)
@click.option("--dit-low", type=PATH, help="The low-noise expert.")
@click.option("--vae", type=PATH, help="Wan2.1_VAE.pth, or its diffusers form.")
@click.option(
    "--text-encoder",
    type=PATH,
    help="models_t5_umt5-xxl-enc-bf16.pth, or its transformers form.",
)
@click.option("--tokenizer", type=PATH, help="tokenizer.json of google/umt5-xxl, or its directory.")
@click.option("--out", required=True, type=FOLDER, help="The bundle to make.")
@click.option(
    "--recipe",
    help=f"One of {', '.join(named('recipes'))}, or a .toml file; by default what the files are. w8a8 quantises.",
)
@click.option("--link", is_flag=True, help="Link to canonical .safetensors files instead of copying them.")
@click.option("--replace", is_flag=True, help="Write over an existing bundle.")
def import_(
    model: str,
    dit: Path | None,
    dit_low: Path | None,
    vae: Path | None,
    text_encoder: Path | None,
    tokenizer: Path | None,
    out: Path,
    recipe: str | None,
    link: bool,
    replace: bool,
) -> None:
    """Check published checkpoint files and turn them into a bundle.

    Every tensor's name, shape and type is checked before anything is written. An interrupted import goes on where it
    stopped when it is run again. tinywan's files come with the package: without any, the bundle is made of those.
    """
    config = load_model(model)
    files = {"dit": dit, "dit-low": dit_low, "vae": vae, "text-encoder": text_encoder, "tokenizer": tokenizer}
    given = {name: path for name, path in files.items() if path is not None}
    sources = sources_of(config, given) if given else embedded(config)
    wanted = None if recipe is None else load_recipe(recipe)
    with Bars() as bars:
        bundle = import_checkpoint(
            config, sources, out, recipe=wanted, link=link, replace=replace, progress=bars.bytes_of
        )
    total = sum(record.bytes for record in bundle.manifest.files.values())
    click.echo(f"{out}: {config.name}, recipe {bundle.recipe.name}, {total / 1e9:.2f} GB; next: wanforge export {out}")


def sources_of(model: ModelConfig, given: Mapping[str, Path]) -> Sources:
    """The files given for a model, by option.

    Raises:
        CheckpointError: one is missing, or one too many.
    """
    denoisers = dict(zip(model.experts, ("dit", "dit-low"), strict=False))
    needed = [*denoisers.values(), "vae", "text-encoder", "tokenizer"]
    if missing := [name for name in needed if name not in given]:
        raise CheckpointError(f"{model.name} needs {join_names([f'--{name}' for name in missing])} as well")
    if "dit-low" in given.keys() - set(needed):
        raise CheckpointError(f"{model.name} has one denoiser; leave out --dit-low")
    weights = {dit_component(expert): given[name] for expert, name in denoisers.items()}
    return Sources({**weights, "vae": given["vae"], "text_encoder": given["text-encoder"]}, given["tokenizer"])


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Compute types; all by default."
)
@click.option("--json", "as_json", is_flag=True, help="List the files as JSON.")
def export(bundle: Path, dtypes: tuple[str, ...], as_json: bool) -> None:
    """Write a bundle's ONNX graphs.

    Graphs whose weights are inputs go to onnx/<type>/; those that point into weights/ (the VAE, and the denoiser as
    one model for ONNX tools) lie beside the manifest. Every one passes onnx's checker first.
    """
    opened = Bundle.open(bundle)
    with Bars() as bars:
        done = export_bundle(opened, dtypes or tuple(DTYPES), lambda name, *count: bars("export", *count))
    size = sum(opened.manifest.files[name].bytes for name in done.written)
    if as_json:
        click.echo(json.dumps({"written": done.written, "skipped": done.skipped, "bytes": size}))
        return
    for name, reason in done.skipped.items():
        click.echo(f"not written: {name}, {reason}", err=True)
    click.echo(
        f"{bundle}: {len(done.written)} graphs, {size / 1e6:.2f} MB; next: wanforge generate {bundle} --prompt …"
    )


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--verify", is_flag=True, help="Read every file and compare its SHA-256.")
@click.option("--plan", metavar="GPUS", help="What each clip there are engines for takes of these GPUs' memory.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(bundle: Path, verify: bool, plan: str | None, as_json: bool) -> None:
    """Show what a bundle holds, and what is missing, stale or damaged, and why.

    Exits with 1 where something is.
    """
    gpus = gpus_of(plan) if plan else {}
    with Bars() as bars:
        opened = Bundle.open(bundle)
        try:
            key = graph_key(opened)
        except WanforgeError:
            key = None  # a weight file is missing or damaged, which the inspection reports
        found = inspect_bundle(opened, key=key, verify=verify, progress=bars.bytes_of)
    plans, unplanned = [], []
    for clip, (name, gpu) in product(built_clips(opened), gpus.items()):
        try:
            plans.append(report(opened, clip, name, gpu))
        except WanforgeError as error:
            unplanned.append(f"no plan for {name}: {error}")
    if gpus and not plans and not unplanned:
        unplanned.append(f"no plan: there are no engines; run: wanforge build {bundle}")
    if as_json:
        told = {**found.as_json(), "plans": [one.as_json() for one in plans], "failures": unplanned}
        click.echo(json.dumps(told))
    else:
        click.echo("\n".join([describe(found), *([table(plans)] if plans else []), *unplanned]))
    if found.problems or unplanned:
        click.get_current_context().exit(1)
