"""The option of commands that show what each step predicts."""

import click

PREVIEW = click.option(
    "--preview", is_flag=True, help="After each step, write what it predicts to NAME.preview.mp4, as a draft."
)
