"""Runs tasks in processes (progress by the unit of work, prompt stop, no orphans) or in threads."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pipeline.bar import Bar

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]  # called by the work with the units of work just done


class WorkerError(RuntimeError):
    """A worker process died without an exception of its own; the message says what that usually means."""


class _Stopped(Exception):
    """The parent wants no more results."""


def run(work: Callable[[Task, Advance], Result], tasks: Iterator[Task], workers: int, bar: Bar) -> Generator[Result]:
    """Yields work(task, advance) of each task, as they finish.

    Args:
        work: function of a module, so that another process can import it.
        tasks: drawn a little ahead of the workers, not all at once.
        workers: processes; 1 works in this one.
        bar: is moved by every call of advance, in whichever process.

    Raises:
        WorkerError: a worker was killed. What the work itself raises comes through as it is.
    """
    if workers == 1:
        for task in tasks:
            yield work(task, _adder(bar))
        return
    # Forked from a server process that has one thread and the work imported: a fork of this process would copy locks
    # that other threads hold, a fresh interpreter each would cost seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    done, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(workers, context, _begin, (dict(os.environ), done, stop))
    pending: set[Future[Result]] = set()
    try:
        for task in tasks:
            pending.add(pool.submit(_work, work, task))
            while len(pending) >= 2 * workers:
                yield from _finished(pending, done, bar)
        while pending:
            yield from _finished(pending, done, bar)
    except BrokenProcessPool as error:
        raise WorkerError(
            "a worker process was killed, most often for want of memory; run the same command again with fewer "
            "--workers (what is finished stays)"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def in_threads(work: Callable[[Task], Result], tasks: Iterable[Task], threads: int) -> Generator[Result]:
    """Yields work(task) of each task in order, for work that mostly waits or hashes; the first error ends it."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(work, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(pending: set[Future[Result]], done: Any, bar: Bar) -> list[Result]:
    finished, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
    bar.update(done.get_obj().value - bar.n)
    pending -= finished
    return [future.result() for future in finished]


def _adder(bar: Bar) -> Advance:
    def advance(units: int) -> None:
        bar.update(units)

    return advance


_done: Any
_stop: Any


def _begin(environment: dict[str, str], done: Any, stop: Any) -> None:
    global _done, _stop
    _done, _stop = done, stop
    # What the server process inherited when it started may be out of date, such as credentials.
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and says when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its workers; without this they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(work: Callable[[Task, Advance], Result], task: Task) -> Result:
    return work(task, _advance)


def _advance(units: int) -> None:
    if _stop.is_set():
        raise _Stopped
    with _done.get_lock():
        _done.value += units
