"""Ends a process that stands still, after printing where each of its threads stands."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from types import TracebackType

# The first rank to give up waits, so that the others print their stacks too before its end tears them down.
_OTHERS_SECONDS = 5.0
# A hang inside a call that holds Python's global lock stops the watching thread as well; faulthandler's needs no lock.
_FALLBACK_SECONDS = 15.0


class StallWatch:
    """Prints every thread's stack to stderr and ends this process when `alive` was not called for so long.

    The watch begins when it is made and ends with its `with` block.

    Args:
        seconds: longest time between two calls.
    """

    def __init__(self, seconds: float):
        self._seconds, self._closed = seconds, threading.Event()
        self.alive()
        threading.Thread(target=self._watch, daemon=True).start()

    def alive(self) -> None:
        """Begins the time anew."""
        self._deadline = time.monotonic() + self._seconds
        faulthandler.dump_traceback_later(self._seconds + _FALLBACK_SECONDS, exit=True, file=2)  # 2: stderr

    def __enter__(self) -> "StallWatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(self._deadline - time.monotonic()):
            if time.monotonic() >= self._deadline:
                _give_up(self._seconds)
                return


def _give_up(seconds: float) -> None:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        stacks = file.read()
    print(
        f"\n[rank {os.environ.get('RANK', '0')}] error: no step for {seconds:g} s (health.stall_seconds). The stacks "
        f"of all threads:\n{stacks}Look for the rank that waits for no other. The same command again goes on from the "
        "newest checkpoint; where start-up, or a step with its samples and checkpoint, may take so long, raise "
        "health.stall_seconds",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(_OTHERS_SECONDS)
    os._exit(1)
