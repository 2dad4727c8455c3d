"""The option of commands that share a request among GPUs."""

import click

GPUS = click.option(
    "--gpus",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of GPUs that share each request, with the backend cuda. The model's heads must be divisible by it.",
)
