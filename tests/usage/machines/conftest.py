"""What several machines share: a database and a bucket."""

from tests.runtime.service.conftest import tinywan
from tests.runtime.service.results.test_results import s3_url
from tests.runtime.service.store.conftest import postgres_url

__all__ = ["postgres_url", "s3_url", "tinywan"]
