"""What Ray Train leaves behind in the driver must not decide how a later stage is interrupted."""

import signal
from types import FrameType

from s2l_ray.stages.training import _interrupts_as_before


def test_the_handler_that_a_fit_installs_is_taken_back() -> None:
    def other(number: int, frame: FrameType | None) -> None:
        raise AssertionError(number)

    before = signal.getsignal(signal.SIGINT)
    try:
        with _interrupts_as_before():
            signal.signal(signal.SIGINT, other)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, before)
