"""Fetches blocks in background threads, whose errors reach whoever waits for the block."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from pipeline.read_counts import ReadCounts

NUM_THREADS = 4  # of a worker process: a fetch is mostly waiting for the store


class Fetcher:
    """Blocks on their way; to be used by one thread.

    Args:
        fetch: Brings one block and counts what that cost; runs in several threads at once.
    """

    def __init__(self, fetch: Callable[[int, ReadCounts], None]) -> None:
        self._fetch = fetch
        self._queue: SimpleQueue[tuple[int, Future[ReadCounts]]] = SimpleQueue()
        self._under_way: dict[int, Future[ReadCounts]] = {}
        # Not an executor, which would finish all that is queued before its process may end.
        for _ in range(NUM_THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def start(self, block: int) -> None:
        """Begins to fetch a block, unless it is on its way."""
        if block not in self._under_way:
            self._under_way[block] = Future()
            self._queue.put((block, self._under_way[block]))

    def wait(self, block: int) -> ReadCounts:
        """Waits for a block that was started; returns what it cost, or raises what its fetch raised."""
        return self._under_way.pop(block).result()

    def finished(self) -> ReadCounts:
        """Forgets the blocks that came without anyone waiting for them; returns what they cost."""
        counts = ReadCounts()
        for block, future in list(self._under_way.items()):
            if future.done() and not future.exception():
                counts += self.wait(block)
        return counts

    def _work(self) -> None:
        while True:
            block, future = self._queue.get()
            counts = ReadCounts()
            try:
                self._fetch(block, counts)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(counts)
