"""What the tests of the pipeline share: ranks without processes."""

import threading

import pytest
import torch


class ThreadWorld:
    """Ranks that are threads of this process; what `World` offers, over a barrier."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, box: dict):
        self.rank, self.size, self.is_main, self.device = rank, size, rank == 0, torch.device("cpu")
        self._barrier, self._box = barrier, box

    def gather(self, value):
        self._box[self.rank] = value
        self._barrier.wait()
        found = [self._box[rank] for rank in range(self.size)]
        self._barrier.wait()
        return found

    def broadcast(self, value):
        return self.gather(value)[0]

    def mean(self, values):
        return sum(self.gather(values)) / self.size


@pytest.fixture(scope="session")
def on_ranks():
    """A function (size, work) that runs work(world) on every rank and returns the results in rank order."""
    return _on_ranks


def _on_ranks(size: int, work):
    barrier, box, results, errors = threading.Barrier(size), {}, {}, []

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadWorld(rank, size, barrier, box))
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
