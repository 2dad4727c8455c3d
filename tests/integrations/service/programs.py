"""Programs of others that run while tests ask them."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

from tests.processes import wait_until


@contextmanager
def answering(
    command: Sequence[str],
    client: httpx2.Client,
    path: str,
    folder: Path,
    environment: dict[str, str] | None = None,
    seconds: float = 20,
) -> Iterator[httpx2.Client]:
    """Run a program in a folder, where it logs, and wait until it answers a client's request for a path.

    Args:
        seconds: How long it may take until it answers.
    """
    log = folder / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output) as process,
    ):
        try:
            with client:

                def is_up() -> bool:
                    assert process.poll() is None, log.read_text()
                    try:
                        return client.get(path).status_code == 200
                    except httpx2.TransportError:
                        return False

                wait_until(is_up, seconds)
                yield client
        finally:
            process.terminate()
