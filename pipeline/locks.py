"""Locks in the run directory: flock(2) on open files, which the kernel gives back when a process dies, however it dies.

Where a file system has no locks, nothing is locked and nothing waits.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_WAIT_SECONDS = 100.0  # file systems on a network miss a dead machine after 90 s or less
_POLL_SECONDS = 0.5

_Training = dict[str, str | int]  # what a training writes into its lock: host, process, Slurm job and its restarts


class RunTakenError(RuntimeError):
    """Another training holds the run directory; the message says which, and the ways out."""


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Waits until no other process is in a block of the same path, which is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        _lock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def only_training(run_dir: Path, tell: Callable[[str], None], is_worth_waiting: Callable[[], bool]) -> Iterator[None]:
    """Keeps every other training out of a run directory while the block lasts.

    A directory that is taken is waited for, as a killed training needs a moment to die. Not waited for is an earlier
    start of the same Slurm job: Slurm starts a job again only when that is gone, whatever the file system still thinks.

    Args:
        run_dir: directory of the run.
        tell: is told what is waited for.
        is_worth_waiting: is asked again and again meanwhile.

    Raises:
        RunTakenError: it is still taken after 100 s, or when waiting is no longer worth it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with _take(run_dir, tell, is_worth_waiting) as file:
        file.write(json.dumps(_this_training()) + "\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _take(run_dir: Path, tell: Callable[[str], None], is_worth_waiting: Callable[[], bool]) -> TextIO:
    """Returns the open, locked and empty lock file."""
    path, this = run_dir / "training.lock", _this_training()
    told, deadline = False, time.monotonic() + _WAIT_SECONDS
    while True:
        file = path.open("a+")
        if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) and _is_still(file, path):
            file.truncate(0)
            return file
        other = _read(file)
        file.close()
        if _is_earlier_start(other, this):
            path.unlink(missing_ok=True)  # its lock goes with it
        elif time.monotonic() > deadline or not is_worth_waiting():
            raise RunTakenError(
                f"{run_dir} (run.dir, run.name) is trained by {_in_words(other)}; two trainings would overwrite each "
                "other's checkpoints. Wait for that one or stop it, or choose another run.name. If its machine is "
                f"dead, remove {path}"
            )
        elif not told:
            tell(f"{run_dir} is trained by {_in_words(other)}; waiting for its end, {_WAIT_SECONDS:.0f} s at most")
            told = True
        else:
            time.sleep(_POLL_SECONDS)


def _this_training(environment: Mapping[str, str] = os.environ) -> _Training:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "slurm_job": environment.get("SLURM_JOB_ID", ""),
        "slurm_restarts": int(environment.get("SLURM_RESTART_COUNT", 0)),  # Slurm sets it at the first requeue
    }


def _read(file: TextIO) -> _Training:
    """Returns what the holder wrote; nothing in the moment before it has."""
    file.seek(0)
    text = file.read()
    return dict(json.loads(text)) if text.endswith("\n") else {}


def _in_words(training: _Training) -> str:
    job = f" (Slurm job {training['slurm_job']})" if training.get("slurm_job") else ""
    return f"process {training.get('process', '?')} on {training.get('host', '?')}{job}"


def _is_still(file: TextIO, path: Path) -> bool:
    """Returns whether an open file is the one of that path, which another may have removed or made anew."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_earlier_start(other: _Training, this: _Training) -> bool:
    same_job = this["slurm_job"] != "" and other.get("slurm_job") == this["slurm_job"]
    return same_job and int(other["slurm_restarts"]) < int(this["slurm_restarts"])


def _lock(file: TextIO, how: int) -> bool:
    """Returns whether this process may go on: it has the lock, or the file system knows none."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
    return True
