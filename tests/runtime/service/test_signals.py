"""The signals that the front takes."""

import os
import signal

from wanforge.runtime.service.signals import hangups_kept, told_of_signals


def test_a_hangup_during_the_start_is_told_afterwards() -> None:
    told: list[int] = []
    before = signal.getsignal(signal.SIGHUP)
    with hangups_kept():
        os.kill(os.getpid(), signal.SIGHUP)
        assert told == []
        with told_of_signals(told.append):
            assert told == [signal.SIGHUP]
    assert signal.getsignal(signal.SIGHUP) == before
