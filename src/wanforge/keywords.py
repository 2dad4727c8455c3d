"""Functions whose keyword settings are described by a TypedDict."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import msgspec

from wanforge.errors import unknown_name

P = ParamSpec("P")
R = TypeVar("R")


def with_settings(settings: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for functions that end with ``**settings: Unpack[Settings]``.

    Python itself accepts any keyword there. The decorated function refuses unknown ones and values of other types. A
    setting of None counts as left out. The signature, and therefore `help`, shows every setting.

    Args:
        settings: A TypedDict with ``total=False``.

    Raises:
        TypeError: (The decorated function.) A keyword is unknown, or its value has the wrong type.
    """
    names = list(settings.__annotations__)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        *own, _ = signature.parameters.values()
        own_names = [each.name for each in own if each.name != "self"]
        listed = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            kwargs = {name: x for name, x in kwargs.items() if x is not None or name not in names}  # type: ignore[assignment]
            given = {name: x for name, x in kwargs.items() if name not in own_names}
            for name in given:
                if name not in names:
                    known = [*own_names, *names]
                    raise TypeError(f"{function.__name__}(): {unknown_name('parameter', name, known)}")
            try:
                msgspec.convert(given, settings)
            except msgspec.ValidationError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            return function(*args, **kwargs)

        checked.__signature__ = signature.replace(parameters=[*own, *listed])  # type: ignore[attr-defined]
        return checked

    return decorate
