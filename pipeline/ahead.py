"""Work done ahead of use in processes of its own, that end with the trainer and never hear its signals."""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def prepare_ahead(
    dataset: Dataset[Any],
    order: Iterable[int] | None = None,
    *,
    num_workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Returns the items of a dataset in order, made in `num_workers` processes; 0 makes them in the calling one.

    Args:
        dataset: each item is whole as it is, nothing is collated.
        order: of the items; None: 0, 1, 2, ...
        num_workers: processes.
        prefetch: items that each makes ahead.
        pin_memory: whether tensors come in page-locked memory.
    """
    if num_workers:
        start_fork_server()
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        worker_init_fn=functools.partial(_start_worker, dict(os.environ)) if num_workers else None,
        multiprocessing_context="forkserver" if num_workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws from the global one
    )


def _as_it_is(item: object) -> object:
    return item


# Workers are forked from a server process of one thread, which has imported what they need: a fork of the trainer would
# copy locks that its threads (gloo, nccl, MLflow) hold at that moment; a fresh interpreter each would cost seconds
# and hundreds of megabytes.

_JOB_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def start_fork_server() -> None:
    """Starts it with the signals blocked that a scheduler sends to all processes of a job.

    They ask the trainer to save and stop, which may take more batches; server and workers inherit the block, and
    `_end_with_trainer` ends them. CPython starts its resource tracker in the same way.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pipeline.loader"])
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        resource_tracker.ensure_running()  # unblocks some of them
        signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker(environment: dict[str, str], worker_id: int) -> None:
    # What the server process inherited when it started may be out of date, such as credentials.
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """Ends this process, whatever it is waiting for, once the trainer says so (`Process.terminate`) or is gone."""
    trainer = multiprocessing.parent_process()
    assert trainer
    while trainer.is_alive():
        heard = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if heard and heard.si_pid == trainer.pid:
            break
    os._exit(1)
