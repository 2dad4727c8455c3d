"""Reading the TOML files. A record refuses keys and values that it does not know; the error names the file, the key and
what may stand there."""

import re
import sys
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, inspect

from wanforge.errors import ConfigError, unknown_name
from wanforge.regular_file import check_regular

CONFIGS = Path(__file__).parent

MOST_BYTES = 1 << 20
"""The largest size of a TOML file: a hundred times that of the largest one here."""

MOST = 1 << 20
"""The largest number of anything: more than any model has, and products of three fit in 64 bits."""

Count = Annotated[int, Meta(ge=1, le=MOST)]
Layers = Annotated[int, Meta(ge=1, le=1024)]
"""A number of layers; each of them takes a while to set up, even without its weights."""
Multiple2 = Annotated[int, Meta(ge=2, le=MOST, multiple_of=2)]
Multiple16 = Annotated[int, Meta(ge=16, le=MOST, multiple_of=16)]
Multiple128 = Annotated[int, Meta(ge=128, le=MOST, multiple_of=128)]
Fraction = Annotated[float, Meta(gt=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0, le=sys.float_info.max)]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every record: immutable, and unknown keys are refused."""


RecordType = TypeVar("RecordType", bound=Record)


def load(path: Path, record: type[RecordType]) -> RecordType:
    """Read one TOML file into `record`.

    Raises:
        ConfigError: The file is missing, is no ordinary file, is not TOML, or has a key or value that the record does
            not know.
    """
    check_regular(path, ConfigError, MOST_BYTES)
    try:
        return msgspec.toml.decode(path.read_bytes().decode("utf-8-sig"), type=record)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {explained(error, record)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: its values are nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def explained(error: msgspec.ValidationError, record: type) -> str:
    """What is wrong with a value that does not fit a record: the key at which it stands, and what may stand there."""
    said, _, place = str(error).partition(" - at `$")
    place = place.rstrip("`").removeprefix(".")
    found = _type_at(record, place)
    if (match := re.fullmatch("Object contains unknown field `(.*)`", said)) and isinstance(found, inspect.StructType):
        said = unknown_name("key", match[1], [field.encode_name for field in found.fields])
    elif (match := re.fullmatch("Object missing required field `(.*)`", said)) is not None:
        said = f"the key {match[1]} is missing"
    elif (match := re.fullmatch("Invalid enum value (.*)", said)) and isinstance(found, inspect.LiteralType):
        said = f"{match[1]} is not allowed; use one of {', '.join(map(str, found.values))}"
    elif said.startswith("Expected"):
        said = said.replace("Expected", "expected", 1)
    return f"{place}: {said}" if place else said


def _type_at(record: type, place: str) -> inspect.Type:
    """The type of the value at a place such as ``dit.dim`` or ``[...].sms[0]``, as msgspec writes it."""
    found = inspect.type_info(record)
    for step in re.findall(r"[^.\[\]]+|\[[^\]]*\]", place):
        match _without_none(found):
            case inspect.StructType(fields=fields):
                found = next(field.type for field in fields if field.encode_name == step)
            case inspect.DictType(value_type=item) | inspect.ListType(item_type=item):
                found = item
    return _without_none(found)


def _without_none(found: inspect.Type) -> inspect.Type:
    """The type of a value that may be left out."""
    if isinstance(found, inspect.UnionType):
        return next(each for each in found.types if not isinstance(each, inspect.NoneType))
    return found


def named(folder: str) -> list[str]:
    """Names of the TOML files in a folder of ``configs``, sorted."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.toml"))


def load_named(kind: str, folder: str, name: str, record: type[RecordType]) -> RecordType:
    """Read the shipped file with this name, or the file `name` itself if it ends in ``.toml``.

    Raises:
        ConfigError: There is no such file, or `load` refuses it.
    """
    if name.endswith(".toml"):
        return load(Path(name), record)
    if name not in (known := named(folder)):
        raise ConfigError(f"{unknown_name(kind, name, known)}, or give a .toml file")
    return load(CONFIGS / folder / f"{name}.toml", record)
