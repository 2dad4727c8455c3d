"""A store for each test, in SQLite and in Postgres."""

import itertools
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.runtime.service.store.rig import Rig, postgres_programs, postgres_server, quick_folder

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a Postgres database."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("Postgres is not installed (Debian: apt-get install postgresql)")
    if find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (the extra postgres)")
    with postgres_server(programs) as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A place for one store."""
    with quick_folder() as folder:
        is_file = request.param == "sqlite"
        rig = Rig(str(folder / "jobs.sqlite") if is_file else new_schema(request.getfixturevalue("postgres_url")))
        yield rig
        rig.close()


def new_schema(url: str) -> str:
    """The URL of an empty schema of a database."""
    import psycopg

    schema = f"store_{next(NUMBERS)}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema}".encode())
    return f"{url}&options=-csearch_path%3D{schema}"
