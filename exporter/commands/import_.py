"""The command that turns checkpoint files into a bundle."""

from dataclasses import dataclass
from pathlib import Path

import click
from click.core import ParameterSource

from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.remedies import export_command
from wanforge.exporter.checkpoint.embedded import EMBEDDED, embedded
from wanforge.exporter.checkpoint.finder.finder import Wanted, find
from wanforge.exporter.checkpoint.importer import import_checkpoint, resume_import
from wanforge.progress import Progress
from wanforge.runtime.commands.options import ANY_PATH, FOLDER, MODELS, RECIPES, takes
from wanforge.runtime.progress import Bars


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """The options of `wanforge import`."""

    folders: tuple[Path, ...]
    model: str | None
    dit: Path | None
    dit_low: Path | None
    vae: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    out: Path | None
    resume: Path | None
    recipe: str | None
    link: bool
    replace: bool

    def files(self) -> dict[str, Path]:
        """The files that were given, by option."""
        every = {
            "--dit": self.dit,
            "--dit-low": self.dit_low,
            "--vae": self.vae,
            "--text-encoder": self.text_encoder,
            "--tokenizer": self.tokenizer,
        }
        return {name: path for name, path in every.items() if path is not None}


@click.command("import")
@click.argument("folders", nargs=-1, type=ANY_PATH, metavar="[FOLDER]...")
@click.option(
    "--model",
    help=f"Model that the files belong to: {MODELS}.  [default: the model that the denoiser fits; {EMBEDDED} without "
    "files]",
)
@click.option(
    "--dit",
    type=ANY_PATH,
    help="Denoiser: a .pth or .safetensors file, the index of a sharded checkpoint, or its folder. For models with "
    "two experts, the high-noise one.",
)
@click.option("--dit-low", type=ANY_PATH, help="Low-noise expert, for models with two; in the same formats as --dit.")
@click.option("--vae", type=ANY_PATH, help="VAE: Wan2.1_VAE.pth, or its diffusers version.")
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
@click.option("--replace", is_flag=True, help="Overwrite an existing bundle.")
@takes(ImportOptions)
def import_(options: ImportOptions) -> None:
    """Check published checkpoint files and turn them into a bundle.

    The files are looked for in the folders, and an option that names a file takes its place. A folder may be one of
    published files, a pipeline of diffusers, or a repository in the cache of huggingface_hub. File names decide first,
    then the names of folders, then contents; what is taken is listed, and where several files may be meant, the
    options that decide. Of a quantised and an unquantised denoiser, the quantised one is taken, unless --recipe is one
    that needs the other. If neither folders nor files are given, the bundle is made from TinyWan's files, which come
    with the package.

    Every tensor's name, shape and type is checked before anything is written. An interrupted import continues where it
    stopped when the same command is run again, or with --resume.

    \b
    Examples:
      wanforge import --out tinywan
      wanforge import --resume tinywan
      wanforge import TurboWan2.1-T2V-1.3B-480P Wan2.1-T2V-1.3B --out turbo-1.3b
      wanforge import checkpoint --recipe bf16-sla --vae Wan2.1_VAE.pth --out turbo-1.3b
      wanforge import --dit TurboWan2.1-T2V-1.3B-480P-quant.pth --vae Wan2.1_VAE.pth \\
          --text-encoder models_t5_umt5-xxl-enc-bf16.pth --tokenizer google/umt5-xxl \\
          --out turbo-1.3b
    """
    with Bars() as bars:
        bundle = imported(options, bars) if options.resume is None else resumed(options.resume, bars)
    total = sum(record.bytes for record in bundle.manifest.files.values())
    click.echo(
        f"{bundle.root}: {bundle.model.name}, recipe {bundle.recipe.name}, {total / 1e9:.2f} GB; "
        f"next: {export_command(bundle.root)}"
    )


def imported(options: ImportOptions, progress: Progress) -> Bundle:
    """The bundle made from the files that were given or found."""
    if options.out is None:
        raise click.UsageError("give the folder of the new bundle with --out")
    model = None if options.model is None else load_model(options.model)
    recipe = None if options.recipe is None else load_recipe(options.recipe)
    if options.folders or options.files():
        found = find(
            Wanted(out=options.out, folders=options.folders, files=options.files(), model=model, recipe=recipe)
        )
        if options.folders or model is None:
            click.echo("\n".join(found.lines()), err=True)
        model, recipe, sources = found.model, found.recipe, found.sources
    else:
        model = load_model(EMBEDDED) if model is None else model
        sources = embedded(model)
    return import_checkpoint(
        model,
        sources,
        options.out,
        recipe=recipe,
        link=options.link,
        replace=options.replace,
        progress=progress,
    )


def resumed(bundle: Path, progress: Progress) -> Bundle:
    """The bundle whose import was interrupted, completed."""
    context = click.get_current_context()
    for name in context.params:
        if name != "resume" and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError("--resume uses the options that the import was given; leave out all others")
    return resume_import(bundle, progress)
