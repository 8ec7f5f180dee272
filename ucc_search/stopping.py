"""SIGTERM stops a run as Ctrl-C does: where it can be gone on with, and with a line that says how."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Which signal stopped the run.

    Attributes:
        status: the exit status of a command that was stopped: 130 after Ctrl-C, 143 after SIGTERM.
    """

    status = 128 + signal.SIGINT

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handler of SIGTERM: what Ctrl-C would do now. Ray Tune has a way of its own while it runs."""
        self.status = 128 + number
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # a shell's background jobs ignore Ctrl-C
            handler = signal.default_int_handler
        handler(signal.SIGINT, frame)


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Within, SIGTERM raises KeyboardInterrupt where Ctrl-C would; only the main thread can see to it."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """What is started within may set a handler of SIGTERM; ours is put back.

    Ray sets one that prints pages of its stack and ends the process.
    """
    ours = signal.getsignal(signal.SIGTERM)
    yield
    if isinstance(ours, Stop):
        signal.signal(signal.SIGTERM, ours)
