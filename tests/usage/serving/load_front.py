"""`wanforge serve` with a maker that notes when a clip begins and when its last frame is decoded.

python -m tests.usage.serving.load_front serve BUNDLE …
"""

from functools import partial

from wanforge.cli import main
from wanforge.runtime.service import supervising
from wanforge.runtime.service.workers.settings import Supervision

if __name__ == "__main__":
    supervising.Supervision = partial(Supervision, maker="tools.workers_pace")  # type: ignore[misc,assignment]
    main()
