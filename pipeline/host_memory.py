"""How this process gets its memory from the system."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names of glibc's malloc.h


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next tensor instead of giving it back; elsewhere does nothing.

    By default each tensor of over 32 MB comes as fresh pages of the system, and clearing these takes two to three
    times as long as the arithmetic of a step on weights (LOG.md). To be called before a training on the CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
