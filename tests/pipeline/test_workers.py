import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.workers import in_threads

COMMAND = [sys.executable, str(Path(__file__).with_name("pool_worker.py"))]


def run(work: str, workers: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, work, str(workers)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once_and_progress_adds_up(workers):
    assert run("square", workers).stdout == "[0, 1, 4, 9, 16, 25] 15\n"


def test_workers_see_the_environment_as_it_is_when_they_start():
    """They are forked from a server that may have started long before."""
    assert run("environment", 2).stdout == "old\nrenewed\n"


def test_threads_give_results_in_order_and_the_first_error_ends_them():
    started = []

    def work(task: int) -> int:
        started.append(task)
        time.sleep(0.05 / (1 + task))
        return 6 // (3 - task)

    results = in_threads(work, range(100), 2)
    assert [next(results), next(results), next(results)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(started) < 100


def test_what_the_work_raises_comes_through():
    assert "ValueError: three is too many" in run("fail", 2).stderr


def test_a_killed_worker_is_an_error_with_a_way_out():
    stderr = run("die", 2).stderr
    assert "WorkerError: a worker process was killed, most often for want of memory; run the same command" in stderr


def test_an_interrupt_does_not_wait_for_the_work_to_end():
    """As Ctrl-C does, of which only the parent may speak: the 100 seconds that each task needs are not waited for."""
    process = subprocess.Popen([*COMMAND, "long", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    children = psutil.Process(process.pid).children(recursive=True)
    for each in [*children, process]:
        each.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert stderr.count("KeyboardInterrupt") == 1
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
