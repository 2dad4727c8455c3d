"""The commands that talk to a server."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from wanforge.errors import RequestError
from wanforge.progress import Progress
from wanforge.runtime.commands.options import FILE, FOLDER, JSON, Finite, takes
from wanforge.runtime.inputs.lora import way_words
from wanforge.runtime.progress import Bars
from wanforge.runtime.service.client.connection import Connection, connected
from wanforge.runtime.service.commands.watching import stream

VARIANTS = {"video": "mp4", "thumbnail": "webp", "spritesheet": "jpg"}
"""What a video becomes, and the suffixes of the files."""


@click.group()
@click.option(
    "--url",
    envvar="WANFORGE_URL",
    default="http://127.0.0.1:8000",
    show_default=True,
    help="Where the server is; the environment variable WANFORGE_URL does the same.",
)
@click.option(
    "--key", envvar="WANFORGE_API_KEY", help="API key, better given as the environment variable WANFORGE_API_KEY."
)
@click.pass_context
def client(ctx: click.Context, url: str, key: str | None) -> None:
    """Use a server: this one, or any other with the API /v1/videos.

    Commands survive a restart of the server: they try again, and go on where they were.
    """
    ctx.obj = ctx.with_resource(connected(url, key))


client.add_command(stream)

ID = click.argument("video", metavar="ID")
OUT = click.option("--out", type=FILE, help="File to write.  [default: ID.mp4]")


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """The options of `wanforge client submit`; those that are None are left to the server."""

    prompt: str
    model: str | None
    size: str | None
    aspect: str | None
    seconds: float | None
    frames: int | None
    seed: int | None
    steps: int | None
    topk: float | None
    lora: str | None
    recipe: str | None
    backend: str | None
    priority: int | None
    image: Path | None
    out: Path | None
    wait: bool
    as_json: bool

    FIELDS = ("prompt", "model", "size", "aspect", "seconds", "frames", "seed", "steps", "topk", "lora", "recipe",
              "backend", "priority")  # fmt: skip

    def fields(self) -> dict[str, Any]:
        """What the server is told."""
        return {name: getattr(self, name) for name in self.FIELDS}


@client.command()
@click.option("--prompt", required=True, help="What the video shows.")
@click.option("--model", help="Name of a model that the server has.  [default: its first]")
@click.option("--size", help="Size such as 832x480 or 480p.  [default: the model's own]")
@click.option("--aspect", help="Aspect ratio, if the size is a resolution such as 480p.")
@click.option("--seconds", type=Finite(), help="Length in seconds.  [default: the model's own]")
@click.option("--frames", type=int, help="Length in frames, 4n+1, in place of seconds.")
@click.option("--seed", type=int, help="Seed of the noise.  [default: drawn by the server]")
@click.option("--steps", type=int, help="Number of sampling steps.")
@click.option("--topk", type=Finite(), help="Share of the key blocks that attention sees.")
@click.option("--lora", help="Name of a LoRA that the server has for the model.")
@click.option("--recipe", help="Recipe, if the server has the model in several.")
@click.option("--backend", help="Backend, if only one will do.")
@click.option("--priority", type=int, help="Higher is sooner, among your own videos.")
@click.option("--image", type=FILE, help="Picture to use as the first frame.")
@click.option("--wait", is_flag=True, help="Wait until the video is made.")
@click.option("--out", type=FILE, help="Wait, and download the video to this file.")
@JSON
@takes(SubmitOptions)
def submit(options: SubmitOptions) -> None:
    """Submit a video, and print its id."""
    connection = current()
    video = connection.submit(options.fields(), options.image)
    if options.wait or options.out is not None:
        video = finished(connection, video["id"])
    if options.out is not None:
        download_to(connection, video["id"], options.out)
    show(video, as_json=options.as_json)


@client.command()
@ID
@JSON
def status(video: str, as_json: bool) -> None:
    """Show how far a video is."""
    show(current().video(video), as_json=as_json)


@client.command()
@ID
@JSON
def wait(video: str, as_json: bool) -> None:
    """Wait until a video is made. The exit code is 1 if it is not."""
    show(finished(current(), video), as_json=as_json)


@client.command()
@ID
@OUT
@click.option(
    "--variant", type=click.Choice(list(VARIANTS)), default="video", show_default=True, help="What to download."
)
def download(video: str, out: Path | None, variant: str) -> None:
    """Download what a video has become. A download that broke off is taken up."""
    path = out or Path(f"{video}.{VARIANTS[variant]}")
    download_to(current(), video, path, variant)
    click.echo(path)


@client.command()
@ID
@JSON
def cancel(video: str, as_json: bool) -> None:
    """Cancel a video, even if it is being made."""
    show(current().cancel(video), as_json=as_json)


@client.command()
@click.argument("file", type=FILE)
@click.option("--out", type=FOLDER, help="Wait, and download the videos into this folder, numbered by line.")
@JSON
def batch(file: Path, out: Path | None, as_json: bool) -> None:
    """Submit many videos: each line of FILE is a prompt, or a JSON object with the fields of a submission.

    FILE may also be the id of a batch that was submitted before, so that its download can be taken up.
    """
    connection = current()
    found = connection.submit_batch(file.read_bytes()) if file.is_file() else connection.batch(str(file))
    if not as_json:
        click.echo(found["id"])
    failed = 0
    if out is not None:
        failed = download_batch(connection, found["id"], out)
        found = connection.batch(found["id"])
    if as_json:
        click.echo(json.dumps(found))
    if failed:
        raise RequestError(f"{failed} of {found['total']} videos were not made; the lines above say why")


def download_batch(connection: Connection, batch_id: str, out: Path) -> int:
    """Download every video of a batch as it is made, unless it is there already. Returns how many were not made."""
    failed = 0
    for index, video in enumerate(connection.videos(batch=batch_id, order="asc"), 1):
        path = out / f"{index:05}.mp4"
        if path.exists():
            continue
        with Bars() as bars:
            done = connection.wait(video["id"], bars)
            if done["status"] == "completed":
                connection.download(video["id"], path, progress=bars)
        if done["status"] == "completed":
            click.echo(path)
        else:
            failed += 1
            click.echo(f"line {index}: {words(done)}", err=True)
    return failed


def current() -> Connection:
    """The connection of the command that runs."""
    connection: Connection = click.get_current_context().find_object(Connection)  # type: ignore[assignment]
    return connection


def finished(connection: Connection, video_id: str) -> dict[str, Any]:
    """A video once it is made.

    Raises:
        RequestError: It was not made.
    """
    with Bars() as bars:
        video = connection.wait(video_id, bars)
    if video["status"] != "completed":
        raise RequestError(f"{video_id}: {words(video)}")
    return video


def download_to(connection: Connection, video_id: str, path: Path, variant: str = "video") -> None:
    with Bars() as bars:
        progress: Progress = bars
        connection.download(video_id, path, variant, progress)


def words(video: dict[str, Any]) -> str:
    """A video's state, with what went wrong."""
    error = video.get("error")
    return f"{video['status']}: {error['message']} ({error['code']})" if error else str(video["status"])


def show(video: dict[str, Any], *, as_json: bool) -> None:
    """Print a video."""
    if as_json:
        click.echo(json.dumps(video))
        return
    place = video.get("queue_position")
    details = [words(video), f"{video['progress']} %"]
    if place is not None:
        details.append(f"{place} before it")
    if loras := video.get("loras"):
        ways = list(dict.fromkeys(way for lora in loras for way in lora["ways"]))
        details.append(f"LoRA {video['lora']} {way_words(ways)}")
    click.echo(f"{video['id']}  {', '.join(details)}")
