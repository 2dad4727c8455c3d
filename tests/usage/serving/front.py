"""`wanforge serve` with a clock that can be moved, a watchdog that waits for seconds, and a maker that notes its runs.

python -m tests.usage.serving.front serve BUNDLE …
"""

from functools import partial

from tests.usage.serving import clock
from wanforge.cli import main
from wanforge.runtime.service import supervising
from wanforge.runtime.service.workers.settings import Supervision, WorkTimes

HANG_SECONDS = 4.0
"""How long a child may make no progress. A launch of the small clips takes far less."""

# Nobody kills as many processes of a server as the trials do, after which its workers would rest for minutes.
if __name__ == "__main__":
    clock.follow()
    supervising.MODULE = "tests.usage.serving.supervisor"
    supervising.Supervision = partial(  # type: ignore[misc,assignment]
        Supervision,
        maker="tests.usage.serving.maker",
        most_deaths=1000,
        times=WorkTimes(hang=HANG_SECONDS, most_backoff=2),
    )
    main()
