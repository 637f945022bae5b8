"""How long a process takes to its first step, and what that time goes to."""

import time
from collections.abc import Callable

import psutil


class StartUp:
    """Seconds from the start of this process, by what they were spent on; the first lap is Python and the imports.

    The operating system tells the start to a second only, so the first lap and the sum are no more exact.
    """

    def __init__(self) -> None:
        self._last = psutil.Process().create_time()
        self._laps: dict[str, float] = {}
        self._told = False
        self.lap("imports")

    def lap(self, name: str) -> None:
        """Ends what was done since the lap before."""
        now = time.time()
        self._laps[name], self._last = max(0.0, now - self._last), now

    def tell_first_step(self, say: Callable[[str], None]) -> None:
        """Says once where the time went; from the second step on it does nothing."""
        if not self._told:
            self.lap("first step")
            laps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._laps.items())
            say(f"first step after {sum(self._laps.values()):.1f} s: {laps}")
            self._told = True
