"""The command line, which lists every command and imports its module only when it is used."""

import errno
import sys
from importlib import import_module
from typing import Any

import click

from wanforge.errors import WanforgeError, memory_errors, unknown_name
from wanforge.requirements import install_package
from wanforge.version import version_text

# In the order in which a user needs them; the summaries are here so that `wanforge --help` imports no torch.
COMMANDS = {
    "synth": (
        "wanforge.exporter.commands.synth:synth",
        "Write checkpoint files in the published formats, with random weights.",
    ),
    "import": (
        "wanforge.exporter.commands.import_:import_",
        "Check published checkpoint files and turn them into a bundle.",
    ),
    "export": ("wanforge.exporter.commands.export:export", "Write a bundle's ONNX graphs."),
    "kernels": (
        "wanforge.runtime.commands.kernels:kernels",
        "Compile the GPU kernels and list the resources that they use.",
    ),
    "build": ("wanforge.runtime.commands.build:build", "Compile a bundle's graphs into engines for GPUs."),
    "inspect": (
        "wanforge.exporter.commands.inspect:inspect",
        "Show what a bundle holds, and what is missing, stale or damaged.",
    ),
    "generate": (
        "wanforge.runtime.commands.generate:generate",
        "Make a video from a prompt, or from an image and a prompt.",
    ),
    "parity": (
        "wanforge.runtime.commands.parity:parity",
        "Compare a backend with the reference, from single ops to whole clips.",
    ),
    "bench": (
        "wanforge.runtime.commands.bench:bench",
        "Time whole requests, or the kernels of an op, and compare with earlier runs.",
    ),
    "suite": (
        "wanforge.exporter.commands.suite:suite",
        "Measure what needs no GPU: export, build, host overhead, ONNX Runtime.",
    ),
    "scaling": (
        "wanforge.exporter.commands.scaling:scaling",
        "Predict time and memory for clips of any length and size, on any GPU.",
    ),
    "doctor": (
        "wanforge.runtime.commands.doctor:doctor",
        "Show what this machine can do, and what is missing.",
    ),
}


class LazyCommands(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS:
            ctx.fail(unknown_name("command", args[0], list(COMMANDS)))
        try:
            return super().resolve_command(ctx, args)
        except ModuleNotFoundError as missing:
            raise click.ClickException(
                f"`wanforge {args[0]}` needs the package {missing.name}, which is not installed; "
                f"run: {install_package(missing.name or '')}"
            ) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with memory_errors():
                return super().invoke(ctx)
        except WanforgeError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            where = f" at {error.filename}" if error.filename else ""
            match error.errno:
                case None | errno.EPIPE:  # not a system error, or one that click ends quietly
                    raise
                case errno.ENOSPC | errno.EDQUOT:
                    advice = "free some space or choose another place"
                case _:
                    advice = "check the path and its permissions"
            raise click.ClickException(f"{error.strerror}{where}; {advice}") from None


def show_version(ctx: click.Context, option: click.Parameter, is_asked: bool) -> None:
    """Print the version, and the commit if this runs from a checkout."""
    if is_asked and not ctx.resilient_parsing:
        click.echo(f"wanforge {version_text()}")
        ctx.exit()


@click.group(cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=show_version,
    help="Show the version, and the commit if this runs from a checkout, and exit.",
)
def cli() -> None:
    """Compile TurboDiffusion's distilled Wan video models, and run them.

    checkpoint files -> import -> bundle -> export -> ONNX graphs -> generate -> mp4
    """


def main() -> None:
    """Run the command line and exit with 0 for success, 1 for an error, 2 for wrong usage, or 130 for an interrupt."""
    try:
        code = cli.main(standalone_mode=False)
    except click.Abort:
        click.echo("\ninterrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
