"""The supervisor with a clock that can be moved."""

from tests.usage.serving import clock
from wanforge.runtime.service.workers.supervisor import main

if __name__ == "__main__":
    clock.follow()
    main()
