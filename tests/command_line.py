"""The command line in this process."""

from click.testing import CliRunner, Result

from wanforge.cli import cli


def run(*arguments: object) -> Result:
    """Run a command."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def succeeded(*arguments: object) -> Result:
    """Run a command that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result
