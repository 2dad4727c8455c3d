"""Noise files, for requests that start from given numbers rather than from a seed.

PyTorch is imported only where tensors are made, so that a request can be checked without it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from wanforge.errors import RequestError
from wanforge.regular_file import check_regular
from wanforge.whole_file import write_atomically

if TYPE_CHECKING:
    from torch import Tensor


def noise_names(num_steps: int) -> list[str]:
    """Names of the tensors in a noise file: the initial noise, then one tensor per step."""
    return ["initial", *(f"step.{index}" for index in range(num_steps))]


def write_noise(path: Path, shape: tuple[int, ...], seed: int, num_steps: int) -> None:
    """Write the noise that a seed generates. If writing fails, no partial file is left."""
    from safetensors.torch import save

    from wanforge.runtime.reference.sampler import gaussian

    source = gaussian(shape, seed)
    write_atomically(path, save({name: next(source) for name in noise_names(num_steps)}))


def check_noise(path: Path, shape: tuple[int, ...], names: Sequence[str]) -> None:
    """Check a noise file without reading its data.

    Raises:
        RequestError: The file is missing or damaged, or its noise has another shape or is for fewer steps.
    """
    check_regular(path, RequestError)
    try:
        with safe_open(path, "np") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except PermissionError:
        raise RequestError(f"{path}: this user may not read the file; change its permissions") from None
    except (SafetensorError, OSError) as error:  # an empty file cannot be mapped
        raise RequestError(f"{path}: not a noise file ({error}); --save-noise writes one") from None
    for name in names:
        if found.get(name) != shape:
            what = list(found[name]) if name in found else "missing"
            raise RequestError(f"{path}: {name} is {what}, this request needs {list(shape)}")


def load_noise(path: Path, shape: tuple[int, ...], names: Sequence[str]) -> "Iterator[Tensor]":
    """The named tensors of a noise file, written by `write_noise` or by other means: float32, of this shape.

    Raises:
        RequestError: `check_noise` refuses the file.
    """
    from safetensors.torch import load_file

    check_noise(path, shape, names)
    found = load_file(path)
    return iter([found[name].float() for name in names])
