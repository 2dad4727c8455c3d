"""Files of noise, for requests that are to start from given numbers rather than from a seed."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from wanforge.errors import RequestError
from wanforge.runtime.reference.sampler import gaussian
from wanforge.whole_file import write_atomically


def noise_names(num_steps: int) -> list[str]:
    """Names of the tensors in a noise file: one to start from, and one per step."""
    return ["initial", *(f"step.{index}" for index in range(num_steps))]


def write_noise(path: Path, shape: tuple[int, ...], seed: int, num_steps: int) -> None:
    """Write the noise that a seed stands for, whole or not at all."""
    source = gaussian(shape, seed)
    write_atomically(path, save({name: next(source) for name in noise_names(num_steps)}))


def check_noise(path: Path, shape: tuple[int, ...], names: Sequence[str]) -> None:
    """Look at a noise file without reading its data.

    Raises:
        RequestError: The file is missing or damaged, or its noise has another shape or is for fewer steps.
    """
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise RequestError(f"{path}: no such noise file") from None
    except SafetensorError as error:
        raise RequestError(f"{path}: not a noise file ({error})") from None
    for name in names:
        if found.get(name) != shape:
            what = list(found[name]) if name in found else "missing"
            raise RequestError(f"{path}: {name} is {what}, this request needs {list(shape)}")


def load_noise(path: Path, shape: tuple[int, ...], names: Sequence[str]) -> Iterator[Tensor]:
    """Noise from a file that `write_noise` or anything else wrote: float32 tensors of this shape, by name.

    Raises:
        RequestError: `check_noise` refuses the file.
    """
    check_noise(path, shape, names)
    found = load_file(path)
    return iter([found[name].float() for name in names])
