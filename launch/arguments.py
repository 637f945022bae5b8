"""Kinds of command-line values that several commands take."""

import argparse
from collections.abc import Callable


def at_least(low: int) -> Callable[[str], int]:
    """Returns a `type` for argparse: whole numbers from `low` on."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    return whole_number
