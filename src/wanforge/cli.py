"""The command line, which lists every command and imports its module only when it is used."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from signal import SIGINT
from typing import Any

import click

from wanforge.errors import WanforgeError, message_of, unknown_name
from wanforge.host.library_errors import library_errors
from wanforge.interrupts import SAID, Interrupted, end, ended_by_signals, exit_code
from wanforge.logs import ROOT, Console
from wanforge.requirements import install_package
from wanforge.streams import patient_streams
from wanforge.version import version_text

# In the order in which a user needs them; the summaries are here so that `wanforge --help` imports no torch.
COMMANDS = {
    "models": (
        "wanforge.exporter.commands.models:models",
        "List the models, what they take to fetch, and the GPUs that they fit.",
    ),
    "pull": (
        "wanforge.exporter.commands.pull:pull_",
        "Fetch the files of a published model, and check them.",
    ),
    "synth": (
        "wanforge.exporter.commands.synth:synth",
        "Write checkpoint files in the published formats, with random weights.",
    ),
    "import": (
        "wanforge.exporter.commands.import_:import_",
        "Check published checkpoint files and turn them into a bundle.",
    ),
    "export": ("wanforge.exporter.commands.export:export", "Write a bundle's ONNX graphs."),
    "export-triton": (
        "wanforge.exporter.inference_server.command:export_triton",
        "Write a model repository for Triton Inference Server.",
    ),
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
    "continue": (
        "wanforge.runtime.continuation.command:continue_",
        "Go on from the last frame of a video, or from a picture.",
    ),
    "batch": (
        "wanforge.runtime.batch.command:batch",
        "Make the videos of a whole file of prompts, and go on where that ended.",
    ),
    "stream": (
        "wanforge.runtime.streaming.command:stream",
        "Make a video that can be watched, and changed, while it is made.",
    ),
    "serve": (
        "wanforge.runtime.service.commands.serve:serve",
        "Run a server that makes videos, with an API and a page, and loses no job.",
    ),
    "client": (
        "wanforge.runtime.service.commands.client:client",
        "Submit videos to a server, follow them, and download them.",
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
    "pace": (
        "wanforge.runtime.pace.command:pace",
        "Predict how fast a causal model streams, and its memory, on any GPU.",
    ),
    "doctor": (
        "wanforge.runtime.commands.doctor:doctor",
        "Show what this machine can do, and what is missing.",
    ),
}


def console_of(ctx: click.Context) -> Console:
    """What shows the log of a command line."""
    return ctx.find_root().ensure_object(Console)


def log_options() -> list[click.Option]:
    """The options that choose what is shown of the log, which are accepted before and after a command's name."""
    return [
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            expose_value=False,
            callback=lambda ctx, option, asked: console_of(ctx).show(verbose=asked),
            help="Show on stderr what is done, and how long each stage takes.",
        ),
        click.Option(
            ["--log-json"],
            is_flag=True,
            expose_value=False,
            callback=lambda ctx, option, asked: console_of(ctx).show(as_json=asked),
            help="Show warnings, progress and errors on stderr as lines of JSON.",
        ),
    ]


def with_log_options(command: click.Command) -> click.Command:
    """Add the options of the log to a command, or to the commands of a group, unless they have them."""
    for each in command.commands.values() if isinstance(command, click.Group) else [command]:
        if all(option.name != "verbose" for option in each.params):
            each.params += log_options()
    return command


class LazyCommands(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        return with_log_options(getattr(import_module(module), attribute))

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
            raise click.ClickException(absence(missing, f"`wanforge {args[0]}`")) from None

    def invoke(self, ctx: click.Context) -> Any:
        with console_of(ctx), failures():
            try:
                with library_errors():
                    return super().invoke(ctx)
            except KeyboardInterrupt as interrupt:
                raise click.Abort from interrupt


@contextmanager
def failures() -> Iterator[None]:
    """Turn an error that a user can cause into one that click shows without a traceback."""
    try:
        yield
    except (WanforgeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:  # not from the system
            raise
        raise click.ClickException(message_of(error)) from None
    except ModuleNotFoundError as missing:
        if (missing.name or "wanforge").partition(".")[0] == "wanforge":  # a mistake of ours
            raise
        raise click.ClickException(absence(missing, "this")) from None


def absence(missing: ModuleNotFoundError, needed_for: str) -> str:
    """The message for a package that is not installed."""
    return (
        f"{needed_for} needs the package {missing.name}, which is not installed; "
        f"run: {install_package(missing.name or '')}"
    )


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


cli.params += log_options()


def main() -> None:
    """Run the command line and exit with 0 for success, 1 for an error or 2 for wrong usage; after a signal, with 128
    and its number, which is 130 for Ctrl-C."""
    try:
        with ended_by_signals(), patient_streams():
            code = exit_code_of_command()
    except Interrupted as interrupt:
        end(interrupt.number)
    sys.exit(code)


def exit_code_of_command() -> int:
    """Run the command line, show the error if there is one, and return the exit code.

    Raises:
        Interrupted: A signal ended the command.
    """
    console = Console()
    try:
        with failures():
            code = cli.main(standalone_mode=False, obj=console)
    except click.Abort as abort:
        if isinstance(abort.__cause__, Interrupted):
            raise abort.__cause__ from None
        click.echo(f"\n{SAID[SIGINT]}", err=True)
        return exit_code(SIGINT)
    except click.ClickException as error:
        show_error(error, console)
        return error.exit_code
    return code if isinstance(code, int) else 0


def show_error(error: click.ClickException, console: Console) -> None:
    """Show an error as text or, with --log-json, as a line of JSON."""
    console.show(as_json="--log-json" in sys.argv)  # wrong usage may have been met before the option was
    if not console.is_json:
        error.show()
        return
    with console:
        ROOT.error(error.format_message())


if __name__ == "__main__":
    main()
