"""The lines of Python that instructions come from.

Cubins are compiled without line numbers, so that they are the same bytes everywhere. When there is something to say of
an instruction, its kernel is compiled once more with line numbers. These are of use only if the instructions are the
same, which is checked each time.
"""

import re
from contextlib import closing
from functools import lru_cache
from pathlib import PurePath
from typing import NamedTuple

from tools.ptx.syntax import read_kernel
from wanforge.plugins.launching.compiler import Worker
from wanforge.plugins.launching.cubins import CubinStore
from wanforge.plugins.launching.launch import Specialisation
from wanforge.plugins.launching.worker import Failed
from wanforge.whole_file import temporary_folder

FILE = re.compile(r'\s*\.file\s+(\d+)\s+"(.*?)"(?:\s+"(.*?)")?')
LINE = re.compile(r"\s*\.loc\s+(\d+ [1-9]\d* \d+)(?:, function_name \S+, inlined_at (\d+ \d+ \d+))?")
"""A place is the number of a file, a line and a column. A line number of 0, as constants have that the compiler made,
counts as none."""


class Frame(NamedTuple):
    """A line of a file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def source(store: CubinStore, specialisation: Specialisation, line: int) -> str:
    """Where an instruction stands in Python: its file and line, and those of the callers that it was inlined into.

    Args:
        line: The line of the instruction in the PTX that is kept beside the cubin.
    """
    kept = read_kernel(store.ptx_path(store.cubins()[specialisation.key]).read_text()).instructions
    text = with_lines(specialisation)
    twin = read_kernel(text).instructions
    if [each.text for each in kept] != [each.text for each in twin]:
        return "an unknown line, because with line numbers other instructions are compiled"
    place = next(each.place for each in kept if each.line == line)
    return ", called from ".join(map(str, frames(text, twin[place].line)))


@lru_cache(maxsize=16)
def with_lines(specialisation: Specialisation) -> str:
    """The PTX of a kernel with line numbers."""
    with temporary_folder() as scratch, closing(Worker(scratch, line_info=True)) as worker:
        answer = worker.compile(specialisation)
    assert not isinstance(answer, Failed), answer.message
    return answer.ptx


def frames(text: str, line: int) -> list[Frame]:
    """The line of Python of an instruction, and those of its callers from the inside out; none if it has none.

    A place says only where it was inlined, so the callers of that one are those of the last place before it. If a
    function calls another twice through the same line of a third, these can be those of the other call. Before version
    3.9, Triton does not say where a line was inlined.

    Args:
        text: PTX with line numbers.
        line: The line of the instruction in it.
    """
    lines = text.splitlines()
    files = {found[1]: str(PurePath(found[2], found[3] or "")) for found in map(FILE.match, lines) if found}
    places = [found.groups() for found in map(LINE.match, reversed(lines[:line])) if found]
    result: list[Frame] = []
    wanted = places[0][0] if places else None
    for place, caller in places:
        if place == wanted:
            file, number, _ = place.split()
            result.append(Frame(files[file], int(number)))
            wanted = caller
    return result
