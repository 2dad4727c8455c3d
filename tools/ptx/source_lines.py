"""The lines of Python that instructions come from.

Cubins are compiled without line numbers, so that they are the same bytes everywhere. When there is something to say of
an instruction, its kernel is compiled once more with line numbers. These are of use only if the instructions are the
same, which is checked each time.
"""

import re
from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache
from linecache import getline
from pathlib import PurePath
from typing import NamedTuple

from tools.ptx.syntax import read_kernel
from wanforge.plugins.launching.compiler import Worker
from wanforge.plugins.launching.cubins import CubinStore
from wanforge.plugins.launching.launch import Specialisation
from wanforge.plugins.launching.worker import Failed
from wanforge.whole_file import temporary_folder

FILE = re.compile(r'\s*\.file\s+(\d+)\s+"(.*?)"(?:\s+"(.*?)")?')
LINE = re.compile(r"\s*\.loc\s+(\d+)\s+([1-9]\d*)\s[^/]*(?://(.*))?")
"""A line number of 0, as constants have that the compiler made, counts as none."""
CALLER = re.compile(r"@\[ ([^\[\]]+):(\d+):\d+")


class Frame(NamedTuple):
    """A line of a file. If it is not known which of several files of one name it is, it has the name only."""

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

    Args:
        text: PTX with line numbers.
        line: The line of the instruction in it.
    """
    lines = text.splitlines()
    files = {found[1]: str(PurePath(found[2], found[3] or "")) for found in map(FILE.match, lines) if found}
    above = next((found for found in map(LINE.match, reversed(lines[:line])) if found), None)
    if above is None:
        return []
    result = [Frame(files[above[1]], int(above[2]))]
    for name, number in CALLER.findall(above[3] or ""):
        known = [path for path in files.values() if PurePath(path).name == name]
        result.append(caller(result[-1], known, Frame(name, int(number))))
    return result


def caller(inner: Frame, paths: Sequence[str], frame: Frame) -> Frame:
    """The place that a function was called from, of which the compiler gives only the name of the file.

    It is in the file whose line there names the function.

    Args:
        inner: A line of the function.
        paths: The files with that name.
    """
    name = function_at(inner)
    fitting = [path for path in paths if name and re.search(rf"\b{name}\b", getline(path, frame.line))]
    fitting = fitting if len(fitting) == 1 else list(paths)
    return frame._replace(file=fitting[0]) if len(fitting) == 1 else frame


def function_at(frame: Frame) -> str:
    """The name of the function that a line belongs to; empty if it is not known."""
    for number in range(frame.line, 0, -1):
        if found := re.match(r"\s*def (\w+)", getline(frame.file, number)):
            return found[1]
    return ""
