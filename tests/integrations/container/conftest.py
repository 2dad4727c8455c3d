"""A bundle of TinyWan, and a Postgres."""

from tests.runtime.service.conftest import tinywan
from tests.runtime.service.store.conftest import postgres_url

__all__ = ["postgres_url", "tinywan"]
