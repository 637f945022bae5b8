"""Runs tasks in processes for test_workers.py; a script, because workers must be able to import what they do."""

import os
import signal
import sys
import time
from contextlib import closing

from pipeline.bar import Bar
from pipeline.workers import run


def square(task, advance):
    advance(task)
    return task * task


def fail_at_three(task, advance):
    if task == 3:
        raise ValueError("three is too many")
    return square(task, advance)


def die(task, advance):
    os.kill(os.getpid(), signal.SIGKILL)


def work_for_long(task, advance):
    print("working", flush=True)
    for _ in range(2000):
        advance(1)
        time.sleep(0.05)


def environment(task, advance):
    return os.environ.get("CREDENTIAL_OF_TODAY")


def environment_twice(workers):
    """What workers see in pools of one server process, before and after a change."""
    for value in ("old", "renewed"):
        os.environ["CREDENTIAL_OF_TODAY"] = value
        with Bar(1, "looking", "units") as bar, closing(run(environment, iter([0]), workers, bar)) as results:
            print(*results)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
    if sys.argv[1] == "environment":
        environment_twice(int(sys.argv[2]))
        sys.exit()
    work = {"square": square, "fail": fail_at_three, "die": die, "long": work_for_long}[sys.argv[1]]
    with Bar(15, "squaring", "units") as bar, closing(run(work, iter(range(6)), int(sys.argv[2]), bar)) as results:
        print(sorted(results), bar.n)
