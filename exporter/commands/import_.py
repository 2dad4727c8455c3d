"""The command that turns checkpoint files into a bundle."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import click
from click.core import ParameterSource

from wanforge.configs.hub import hub_model
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import IMPORT
from wanforge.engines.bundle.remedies import export_command
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.embedded import EMBEDDED, EVERY, embedded
from wanforge.exporter.checkpoint.finder.finder import Wanted, find
from wanforge.exporter.checkpoint.importer import resume_import, run_import
from wanforge.exporter.checkpoint.preview.preview_file import read_preview
from wanforge.exporter.checkpoint.record import Arguments, conversions, read_record
from wanforge.exporter.commands.dry_run import done_import_work, estimate_import
from wanforge.exporter.export import has_graphs
from wanforge.exporter.hub.pulled import named_model, pulled_folders
from wanforge.progress import Overall
from wanforge.runtime.commands.options import ANY_PATH, DRY_RUN, FOLDER, JSON, MODELS, RECIPES, takes
from wanforge.runtime.measure.durations import remember
from wanforge.runtime.measure.estimates import show
from wanforge.runtime.progress import Bars


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """The options of `wanforge import`."""

    folders: tuple[Path, ...]
    model: str | None
    dit: Path | None
    dit_low: Path | None
    vae: Path | None
    preview: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    out: Path | None
    resume: Path | None
    recipe: str | None
    link: bool
    keep_unquantised: bool
    replace: bool
    dry_run: bool
    as_json: bool

    def files(self) -> dict[str, Path]:
        """The files that were given, by option."""
        every = {
            "--dit": self.dit,
            "--dit-low": self.dit_low,
            "--vae": self.vae,
            "--preview": self.preview,
            "--text-encoder": self.text_encoder,
            "--tokenizer": self.tokenizer,
        }
        return {name: path for name, path in every.items() if path is not None}


@click.command("import")
@click.argument("folders", nargs=-1, type=ANY_PATH, metavar="[MODEL | FOLDER...]")
@click.option(
    "--model",
    help=f"Model that the files belong to: {MODELS}.  [default: the model that the denoiser fits; {EMBEDDED} without "
    "files]",
)
@click.option(
    "--dit",
    type=ANY_PATH,
    help="Denoiser: a .pth, .safetensors or .gguf file, the index of a sharded checkpoint, or its folder. For models "
    "with two experts, the high-noise one.",
)
@click.option("--dit-low", type=ANY_PATH, help="Low-noise expert, for models with two; in the same formats as --dit.")
@click.option("--vae", type=ANY_PATH, help="VAE: Wan2.1_VAE.pth, or its diffusers version.")
@click.option(
    "--preview",
    type=ANY_PATH,
    help="Tiny decoder for previews, which is not needed for videos: taew2_1 or lighttaew2_1, .safetensors or .pth. "
    "Under these names it is found in the folders as well.",
)
@click.option(
    "--text-encoder",
    type=ANY_PATH,
    help="Text encoder: models_t5_umt5-xxl-enc-bf16.pth, or its transformers version.",
)
@click.option("--tokenizer", type=ANY_PATH, help="Tokenizer: tokenizer.json of google/umt5-xxl, or the folder with it.")
@click.option("--out", type=FOLDER, help="Folder of the new bundle.")
@click.option(
    "--resume",
    type=FOLDER,
    metavar="BUNDLE",
    help="Continue the interrupted import of this bundle with the options that it was given, or write its damaged and "
    "missing weights again. Takes the place of all other options.",
)
@click.option(
    "--recipe",
    help=f"Recipe of the bundle: {RECIPES}. Those that begin with w8a8 quantise unquantised files.  "
    "[default: chosen by the files' contents]",
)
@click.option("--link", is_flag=True, help="Link to canonical .safetensors files instead of copying them.")
@click.option(
    "--keep-unquantised",
    is_flag=True,
    help="Keep the weights that the recipe quantises as they are, too. LoRAs are then merged into them; otherwise they "
    "act beside the quantised ones, which takes time at each step. Takes two bytes per weight.",
)
@click.option("--replace", is_flag=True, help="Overwrite an existing bundle.")
@DRY_RUN
@JSON
@takes(ImportOptions)
def import_(options: ImportOptions) -> None:
    """Check published checkpoint files and turn them into a bundle.

    MODEL is the name of a model that `wanforge pull` has fetched. Otherwise the files are looked for in the folders,
    and an option that names a file takes its place. A folder may be one of published files, a pipeline of diffusers, or
    a repository in the cache of huggingface_hub. File names decide first, then the names of folders, then contents;
    what is taken is listed, and where several files may be meant, the options that decide. Of a quantised and an
    unquantised denoiser, the quantised one is taken, unless --recipe is one that needs the other. If no model, folder
    or file is given, the bundle is made from TinyWan's files, which come with the package; so do those of tinywan-i2v,
    its image-to-video model, and of tinywan-causal, which makes a video chunk by chunk.

    Weights that LightX2V, ComfyUI, ModelOpt or ggml's tools have quantised keep their numbers if the recipe has such
    numbers, as the default one mostly has. Otherwise they are dequantised and quantised, and the error is printed.

    Every tensor's name, shape and type is checked before anything is written. An interrupted import continues where it
    stopped when the same command is run again, or with --resume.

    \b
    Examples:
      wanforge import --out tinywan
      wanforge import tinywan-i2v --out tinywan-i2v
      wanforge import tinywan-causal --recipe w8a8 --out tinywan-causal
      wanforge import --resume tinywan
      wanforge import turbowan2.1-t2v-1.3b-480p --out turbo-1.3b
      wanforge import TurboWan2.1-T2V-1.3B-480P Wan2.1-T2V-1.3B --out turbo-1.3b
      wanforge import checkpoint --recipe bf16-sla --vae Wan2.1_VAE.pth --out turbo-1.3b
      wanforge import --dit TurboWan2.1-T2V-1.3B-480P-quant.pth --vae Wan2.1_VAE.pth \\
          --text-encoder models_t5_umt5-xxl-enc-bf16.pth --tokenizer google/umt5-xxl \\
          --out turbo-1.3b
    """
    start = perf_counter()
    if options.resume is not None:
        check_alone("resume")
        record = read_record(options.resume)
        with Bars(None if record is None else Overall(sizes(record.arguments.sources))) as bars:
            bundle = resume_import(options.resume, bars)
        report(bundle, as_json=options.as_json)
        return
    if options.out is None:
        raise click.UsageError("give the folder of the new bundle with --out")
    out = options.out
    arguments, is_new = arguments_of(with_pulled(options), out), not (out / IMPORT).exists()
    if options.preview is not None:
        click.echo(f"preview: {read_preview(options.preview)}", err=True)
    if options.dry_run:
        show(estimate_import(arguments, out, replace=options.replace), as_json=options.as_json)
        return
    with Bars(Overall(sizes(arguments.sources))) as bars:
        bundle = run_import(arguments, out, replace=options.replace, progress=bars)
    seconds = perf_counter() - start
    if is_new:
        remember(done_import_work(arguments, bundle), seconds)
    report(bundle, as_json=options.as_json)


def with_pulled(options: ImportOptions) -> ImportOptions:
    """The options with the folders of a pulled model in the place of its name. A model is named where a folder could
    stand, or with --model if there are neither folders nor files.

    Raises:
        CheckpointError: The model was not pulled.
    """
    names = [name for folder in options.folders if (name := named_model(folder))]
    if names and (len(options.folders) > 1 or options.model not in (None, names[0])):
        raise click.UsageError(f"there is no folder {names[0]}; give the name of a model alone, or folders and --model")
    if (
        not options.folders
        and not options.files().keys() - {"--preview"}
        and hub_model(options.model or "") is not None
    ):
        names = [str(options.model)]
    if not names:
        return options
    recipe = None if options.recipe is None else load_recipe(options.recipe)
    folders = () if names[0] in EVERY else tuple(pulled_folders(names[0], recipe))
    return replace(options, model=names[0], folders=folders)


def arguments_of(options: ImportOptions, out: Path) -> Arguments:
    """What the import is asked for, with the files that were given or found."""
    model = None if options.model is None else load_model(options.model)
    recipe = None if options.recipe is None else load_recipe(options.recipe)
    if options.folders or options.files().keys() - {"--preview"}:
        found = find(Wanted(out=out, folders=options.folders, files=options.files(), model=model, recipe=recipe))
        if options.folders or model is None:
            click.echo("\n".join(found.lines()), err=True)
        model, sources, recipe = found.model, found.sources, found.recipe
    else:
        model = load_model(EMBEDDED) if model is None else model
        sources = embedded(model)
        if options.preview is not None:
            sources = replace(sources, weights={**sources.weights, "preview": options.preview})
    return Arguments.of(model, sources, recipe, options.link, keep_unquantised=options.keep_unquantised)


def sizes(sources: Sources) -> dict[str, float]:
    """About how many bytes of weights there are to write, by component: those of the files that hold them."""
    return {
        component: sum(file.stat().st_size for file in files_of(path)) for component, path in sources.weights.items()
    }


def files_of(path: Path) -> list[Path]:
    """The files of a component: one, or the shards in a folder or beside an index; none if there is none."""
    if path.is_dir() or path.suffix == ".json":
        return list((path if path.is_dir() else path.parent).glob("*.safetensors"))
    return [path] if path.is_file() else []


def check_alone(name: str) -> None:
    """Refuse other options beside one that takes their place."""
    context = click.get_current_context()
    for other in context.params:
        if other not in (name, "as_json") and context.get_parameter_source(other) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} uses the options that the import was given; leave out all others")


def size_of(bundle: Bundle) -> int:
    """The bytes of a bundle's files."""
    return sum(record.bytes for record in bundle.manifest.files.values())


def report(bundle: Bundle, *, as_json: bool) -> None:
    """Print what was made, and what to do next."""
    found = conversions(bundle.root)
    if as_json:
        made = {"bundle": str(bundle.root), "model": bundle.model.name, "recipe": bundle.recipe.name}
        click.echo(json.dumps({**made, "bytes": size_of(bundle), **({"conversions": found} if found else {})}))
        return
    for component, said in found.items():
        click.echo(f"{component}: {said}")
    torch = f"wanforge generate {shlex.quote(str(bundle.root))} --backend torch --prompt …"
    click.echo(
        f"{bundle.root}: {bundle.model.name}, recipe {bundle.recipe.name}, {size_of(bundle) / 1e9:.2f} GB; "
        f"next: {export_command(bundle.root) if has_graphs(bundle.recipe) else torch}"
    )
