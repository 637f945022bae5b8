"""How every command tells a person what went wrong."""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn


def report(error: Exception) -> int:
    """Prints an error a person can mend and returns exit status 1.

    Ranks mostly fail alike. The others wait a little, so that rank 0 speaks for all and the launcher ends the rest;
    what only one rank met is still printed.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(10)
    prefix = "" if rank == "0" else f"[rank {rank}] "
    print(f"\n{prefix}error: {error}", file=sys.stderr, flush=True)
    return 1


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with its exit status; Ctrl-C is no error to print the stacks of."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nstopped; what is finished stays", file=sys.stderr)
        sys.exit(130)  # as a shell tells of it
