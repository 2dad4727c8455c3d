"""Measure how the code is arranged: ``python tools/house.py [--root CHECKOUT] [--json] [--time]``.

It counts lines per room (a folder's own files), the length of files and functions, functions with many parameters,
public classes that share a name, the modules that importing a backend loads, and import cycles. Every import counts,
including those inside functions. With ``--time`` it also runs ``make quick`` and ``make test``, which takes minutes.
"""

import argparse
import ast
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLOORS = ("configs", "plugins", "engines", "runtime", "exporter")
MOST_PARAMETERS = 7
BACKENDS = ("torch", "ort", "cuda", "trt")
WATCHED = {
    "builder": r"wanforge\.engines\.builder",
    "compiler": r"wanforge\.plugins\.(launching\.)?compiler",
    "TensorRT": r"tensorrt|wanforge\.plugins\.tensorrt",
    "onnx": r"onnx(script)?(\.|$)",
    "Triton": r"triton(\.|$)",
    "cost model": r"wanforge\.runtime\.(cost|(un)?fused_plan|measure\.cost)",
}
"""What a backend should not need, each with a pattern of the module names that show it was loaded. The patterns also
fit older checkouts."""


def sources(root: Path) -> dict[str, Path]:
    """The path of every module of the package, by module name."""
    found = {}
    for folder in FLOORS:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(("wanforge", *parts)).removesuffix(".__init__")] = path
    for path in sorted((root / "src" / "wanforge").rglob("*.py")):
        parts = path.relative_to(root / "src").with_suffix("").parts  # the links to the floors are not followed
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def rooms(root: Path) -> dict[str, tuple[int, int]]:
    """The numbers of files and lines in each folder, excluding its subfolders."""
    found: dict[str, tuple[int, int]] = {}
    for path in sources(root).values():
        room = str(path.parent.relative_to(root))
        files, lines = found.get(room, (0, 0))
        found[room] = files + 1, lines + len(path.read_text().splitlines())
    return dict(sorted(found.items()))


def spread(values: list[int]) -> dict[str, float]:
    """The median, ninth decile, maximum and count of some values."""
    return {
        "median": statistics.median(values),
        "p90": statistics.quantiles(values, n=10)[-1],
        "max": max(values),
        "count": len(values),
    }


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the function is a click command, whose parameters are its options."""
    return any("command(" in ast.unparse(decorator) for decorator in function.decorator_list)


def is_written_for_others(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether ONNX Script or Triton compiles the function, so that its parameters are those of an op or a kernel."""
    return any(ast.unparse(each).startswith(("script(", "triton.jit", "gluon.jit")) for each in function.decorator_list)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The number of parameters without ``self``, ``cls`` or ``ctx``; ``*args`` and ``**kwargs`` count as one each."""
    spec = function.args
    names = [each.arg for each in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    extra = sum(each is not None for each in (spec.vararg, spec.kwarg))
    return len(names) - (names[:1] in (["self"], ["cls"], ["ctx"])) + extra


def imports(tree: ast.AST, known: set[str]) -> set[str]:
    """The modules of the package that a module imports anywhere, by a statement or by name in ``import_module``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {
                each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)
            }
    return found & known


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == node:
                    break
            if len(group) > 1 or node in graph[node]:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)


def loaded_by(root: Path, backend: str) -> dict[str, Any]:
    """What importing a backend loads: the number of modules of the package, and which entries of `WATCHED`."""
    code = f"import sys, wanforge.runtime.backends.{backend}; print('\\n'.join(sys.modules))"
    environment = {"PYTHONPATH": str(root / "src"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    names = done.stdout.splitlines()
    watched = [what for what, pattern in WATCHED.items() if any(re.match(pattern, name) for name in names)]
    return {"modules": sum(name.startswith("wanforge") for name in names), "loads": watched}


def measure(root: Path) -> dict[str, Any]:
    """Measure everything except the times."""
    modules = sources(root)
    trees = {name: ast.parse(path.read_text()) for name, path in modules.items()}
    every = [(name, function) for name, tree in trees.items() for function in functions(tree)]
    classes: dict[str, list[str]] = defaultdict(list)
    for name, tree in trees.items():
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(name)
    wide = {
        f"{name}.{function.name}": parameters(function)
        for name, function in every
        if parameters(function) > MOST_PARAMETERS and not is_command(function) and not is_written_for_others(function)
    }
    graph = {name: imports(tree, set(modules)) - {name} for name, tree in trees.items()}
    return {
        "rooms": {room: {"files": files, "lines": lines} for room, (files, lines) in rooms(root).items()},
        "files": spread([len(path.read_text().splitlines()) for path in modules.values()]),
        "functions": spread([(f.end_lineno or f.lineno) - f.lineno + 1 for _, f in every]),
        "many_parameters": dict(sorted(wide.items(), key=lambda item: -item[1])),
        "shared_names": {name: where for name, where in sorted(classes.items()) if len(where) > 1},
        "backends": {name: loaded_by(root, name) for name in BACKENDS},
        "cycles": cycles(graph),
    }


def timed(root: Path, target: str) -> str:
    """Run a Makefile target and return its seconds with pytest's last line."""
    start = time.perf_counter()
    done = subprocess.run(["make", target], cwd=root, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    return f"{time.perf_counter() - start:.0f} s ({last})"


def text(found: dict[str, Any]) -> str:
    """Format the figures for a terminal."""
    lines = ["room                                      files   lines"]
    for room, counts in found["rooms"].items():
        lines.append(f"{room:40}  {counts['files']:5}  {counts['lines']:6,}")
    for what in ("files", "functions"):
        numbers = ", ".join(f"{name} {value:,.0f}" for name, value in found[what].items())
        lines.append(f"{what}: {numbers}")
    counted = Counter(found["many_parameters"])
    lines.append(f"functions with more than {MOST_PARAMETERS} parameters: {len(counted)}")
    lines += [f"  {name}: {number}" for name, number in counted.items()]
    lines.append(f"public classes that share a name: {len(found['shared_names'])}")
    lines += [f"  {name}: {', '.join(where)}" for name, where in found["shared_names"].items()]
    for name, loaded in found["backends"].items():
        said = (
            loaded.get("error") or f"{loaded['modules']} modules, with {', '.join(loaded['loads']) or 'nothing extra'}"
        )
        lines.append(f"importing backends.{name}: {said}")
    lines.append(f"import cycles: {len(found['cycles'])}")
    lines += [f"  {' <-> '.join(group)}" for group in found["cycles"]]
    lines += [f"make {target}: {said}" for target, said in found.get("times", {}).items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, help="the checkout to measure")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--time", action="store_true", help="also time make quick and make test")
    arguments = parser.parse_args()
    found = measure(arguments.root.resolve())
    if arguments.time:
        found["times"] = {target: timed(arguments.root, target) for target in ("quick", "test")}
    print(json.dumps(found, indent=1) if arguments.json else text(found))


if __name__ == "__main__":
    main()
