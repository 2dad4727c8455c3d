"""Grid rules: small expressions over a kernel's arguments that give its number of programs along each axis."""

import ast
import operator
from collections.abc import Mapping
from functools import lru_cache
from threading import Lock

PARSING = Lock()
"""Held while Python's parser runs: Python 3.11 keeps one recursion depth for all threads, which can become wrong."""

_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def evaluate(expression: str, names: Mapping[str, int]) -> int:
    """The value of a grid rule, made of integers, names, + - * //, ``min(a, b)``, ``max(a, b)`` and ``cdiv(a, b)``, a
    division rounded up.

    Raises:
        ValueError: The rule contains anything else.
    """

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
                return _OPERATIONS[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id="cdiv"), args=[a, b]):
                return -(-value(a) // value(b))
            case ast.Call(func=ast.Name(id="min" | "max" as which), args=[a, b]):
                return (min if which == "min" else max)(value(a), value(b))
        raise ValueError(f"a grid rule cannot contain {ast.unparse(node)!r}")

    return value(_parsed(expression))


@lru_cache
def _parsed(expression: str) -> ast.expr:
    with PARSING:
        return ast.parse(expression, mode="eval").body
