"""The wish to end early with everything saved: a signal, or a launcher that is gone."""

import os
import signal
import time
from types import FrameType, TracebackType

# torchrun and `accelerate launch` set one of them. Of a process started by hand a parent may go away (nohup).
_SET_BY_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


class StopRequest:
    """Remembers the first reason to stop: SIGTERM, SIGUSR1, or the end of the launcher that started this process.

    Within its `with` block the signals end nothing by themselves, however often they come; after it they are what
    they were before.
    """

    def __init__(self) -> None:
        self._reason, self._came = "", 0.0
        self._launcher = os.getppid() if any(name in os.environ for name in _SET_BY_LAUNCHERS) else None
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def requested(self) -> bool:
        """Returns whether there is a reason to stop."""
        # Nobody ends ranks without a launcher, and the next start would share the run directory with them.
        if self._launcher not in (None, os.getppid()):
            self._remember("the end of its launcher")
        return bool(self._reason)

    def heard(self) -> tuple[float, str]:
        """Returns how many seconds ago the first reason came, and the reason; (0, "") where none did."""
        return (time.monotonic() - self._came, self._reason) if self._reason else (0.0, "")

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._remember(signal.Signals(number).name)

    def _remember(self, reason: str) -> None:
        if not self._reason:
            self._reason, self._came = reason, time.monotonic()
