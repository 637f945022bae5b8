"""Program of test_world.py: joins the world as every command does and says what it found."""

import sys

from pipeline.world import World, WorldSizeError


def main() -> int:
    try:
        world = World("cpu")
    except WorldSizeError as error:
        print(error, file=sys.stderr)
        return 1
    ranks = world.gather(world.rank)
    if world.is_main:
        print(f"one world of ranks {ranks}")
    world.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
