"""Reading the TOML files. A record refuses keys and values that it does not know, and the error names the file."""

from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from wanforge.errors import ConfigError, unknown_name

CONFIGS = Path(__file__).parent

Count = Annotated[int, Meta(ge=1)]
Multiple16 = Annotated[int, Meta(ge=16, multiple_of=16)]
Multiple128 = Annotated[int, Meta(ge=128, multiple_of=128)]
Fraction = Annotated[float, Meta(gt=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0)]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every record: immutable, and unknown keys are refused."""


RecordType = TypeVar("RecordType", bound=Record)


def load(path: Path, record: type[RecordType]) -> RecordType:
    """Read one TOML file into `record`.

    Raises:
        ConfigError: The file is missing, is not TOML, or has a key or value that the record does not know.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=record)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: {error}") from None


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
