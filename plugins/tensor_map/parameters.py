"""What a tensor map is to a kernel: 128 bytes, and behind them its sizes and strides, as Triton 3.9 compiles it.

Nothing here imports PyTorch, because the compiler's process does not.
"""

from collections.abc import Iterable, Iterator, Sequence

PREFIX = "tensordesc<"
"""How Triton's type of a tensor map begins."""


def kind_of(pointer: str, itemsize: int, box: Sequence[int]) -> str:
    """Triton's type of a tensor map, given its type of pointers to the elements, such as ``*i8``, and their bytes."""
    element, sides = pointer.removeprefix("*"), ",".join(map(str, box))
    return f"{PREFIX}{element}[{sides}],NVMMASharedLayout({itemsize * box[-1]}, {8 * itemsize}, {len(box)})>"


def is_map(kind: str) -> bool:
    """Whether a parameter of this type is a tensor map."""
    return kind.startswith(PREFIX)


def number_names(name: str, dimensions: int) -> list[str]:
    """What the sizes and the strides of a tensor map are called as parameters of the machine code."""
    return [f"{name}.{which}.{i}" for which in ("sizes", "strides") for i in range(dimensions)]


def is_number(name: str) -> bool:
    """Whether a parameter of the machine code is a size or a stride of a tensor map."""
    return "." in name


def expanded(parameters: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The names and types of a kernel's parameters in the machine code, given those in its source."""
    for name, kind in parameters:
        yield name, kind
        if is_map(kind):
            dimensions = kind.partition("]")[0].count(",") + 1
            yield from zip(number_names(name, dimensions), dimensions * ["i32"] + dimensions * ["i64"], strict=True)
