"""One word per idea: the names in the code follow the glossary of docs/architecture.md."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tools.house import sources

ROOT = Path(__file__).parent.parent
TREES = {name: ast.parse(path.read_text()) for name, path in sources(ROOT).items()}


def glossary() -> list[tuple[str, str, str]]:
    """The rows of the table: a word, what it means, and the names that it replaces."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.*?)\|$", page[page.index("## Words") :], re.MULTILINE)
    return rows[1:]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def public_classes() -> Iterator[tuple[str, str]]:
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, module


def assigned() -> Iterator[ast.expr]:
    """The targets of all assignments outside of functions and classes."""
    for tree in TREES.values():
        for node in tree.body:
            if isinstance(node, ast.Assign):
                yield from node.targets


def identifiers() -> set[str]:
    """Names of modules, and the names in `KNOWN` of any class, function, parameter, variable, attribute or string."""
    found = {part for module in TREES for part in module.split(".")}
    for tree in TREES.values():
        for node in ast.walk(tree):
            found |= {getattr(node, field, None) for field in ("name", "id", "attr", "arg", "value")} & KNOWN
    return found


KNOWN = {name for _, _, replaced in glossary() for name in quoted(replaced)}


def test_no_two_public_classes_share_a_name() -> None:
    modules = defaultdict(list)
    for name, module in public_classes():
        modules[name].append(module)
    assert {name: where for name, where in modules.items() if len(where) > 1} == {}


def test_each_word_stands_in_the_glossary_once() -> None:
    words = [word for words, _, _ in glossary() for word in words.split(", ")]
    assert len(words) > 20
    assert len(words) == len(set(words))


def test_types_of_the_glossary_exist() -> None:
    aliases = {target.id for target in assigned() if isinstance(target, ast.Name)}
    known = {name for name, _ in public_classes()} | aliases
    named = {name.split(".")[0] for _, meaning, _ in glossary() for name in quoted(meaning)}
    assert {name for name in named if re.fullmatch(r"([A-Z][a-z0-9]+)+", name)} <= known


def test_names_that_the_glossary_replaces_do_not_come_back() -> None:
    assert KNOWN
    assert KNOWN & identifiers() == set()
