"""`wanforge serve` without PyTorch, with short leases, and with a child that makes files that are no clips.

python -m tests.usage.machines.front serve …
"""

import sys
from functools import partial

sys.modules["torch"] = None  # type: ignore[assignment]

from wanforge.cli import main  # noqa: E402
from wanforge.runtime.service import settings, supervising  # noqa: E402
from wanforge.runtime.service.workers.settings import Supervision, WorkTimes  # noqa: E402

if __name__ == "__main__":
    settings.LEAST_LEASE_SECONDS = 1.0
    supervising.Supervision = partial(  # type: ignore[misc,assignment]
        Supervision,
        maker="tests.runtime.service.workers.stand_in_maker",
        most_deaths=1000,
        times=WorkTimes(heartbeat=0.5, sweep=0.5, backoff=0.05),
    )
    main()
