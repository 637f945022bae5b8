"""The wish to end early with everything saved: a signal, or a launcher that is gone."""

import os
import signal
import time
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_IMPATIENT_SECONDS = 3.0  # one Ctrl-C comes from the terminal and from the launcher; a person's second comes later
# torchrun and `accelerate launch` set one of them. Of a process started by hand a parent may go away (nohup).
_SET_BY_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


class StopRequest:
    """Remembers the first reason to stop: Ctrl-C, SIGTERM, SIGUSR1, or the end of the launcher of this process.

    Within its `with` block the signals end nothing by themselves, however often they come, but for a second Ctrl-C
    (KeyboardInterrupt); after it they are what they were before.
    """

    def __init__(self) -> None:
        self._reason, self._came = "", 0.0
        self._launcher = os.getppid() if any(name in os.environ for name in _SET_BY_LAUNCHERS) else None
        # Who starts a process with SIGINT ignored (`&` in a script) wants Ctrl-C to pass it by.
        heard = [n for n in _SIGNALS if n != signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._hear) for number in heard}

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
        if number == signal.SIGINT:
            if self._reason and time.monotonic() - self._came > _IMPATIENT_SECONDS:
                raise KeyboardInterrupt
            if not self._reason and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nCtrl-C: saving a checkpoint after this step, then ending; again: ending at once\n")
        self._remember(signal.Signals(number).name)

    def _remember(self, reason: str) -> None:
        if not self._reason:
            self._reason, self._came = reason, time.monotonic()
