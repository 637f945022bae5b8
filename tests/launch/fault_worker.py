"""Program of test_kill.py, test_preemption.py and test_stall.py: launch/train.py with faults at chosen moments.

Usage: fault_worker.py NOTES FAULTS CONFIG [override ...]. FAULTS is a JSON list of
{"rank": 0, "at": POINTS, "data" or "exit", "call": 3, "do": "kill" | "kill halfway" | "kill later" | "signals" |
"raise" | "raise user error" | "sleep", "seconds": for "kill later" and "sleep"}: at that call, on that rank.
NOTES/rank-R.jsonl gets ["batch", number, sample ids], ["kill", step, points under way], ["exit", status], ["end"].
"""

import atexit
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import safetensors.torch
import torch

from launch import train as command
from launch.errors import run
from pipeline import checkpoint, sampling, trainer
from pipeline.journal import Journal
from pipeline.loader import Loader
from pipeline.tracking import RunTracker

# Where a fault may strike, and which calls of the function count.
POINTS = {
    "open": (trainer, "open_shard_set", lambda *a: True),
    "resume": (checkpoint, "newest", lambda *a: True),
    "step": (trainer.Trainer, "_one_step", lambda *a: True),
    "sample": (sampling, "sample_grid", lambda *a: True),
    "write": (safetensors.torch, "save_file", lambda *a: True),
    "write optimizer": (torch, "save", lambda *a: True),
    "sync": (checkpoint, "_sync", lambda *a: True),
    "publish": (Path, "rename", lambda path, target: path.name.endswith(".partial")),
    "prune": (Path, "rename", lambda path, target: Path(target).name.endswith(".partial")),
    "remove": (shutil, "rmtree", lambda path, *a, **k: str(path).endswith(".partial") and Path(path).exists()),
    "journal": (Journal, "append", lambda journal, record: "step" in record),
    "close": (RunTracker, "close", lambda *a: True),
    "shutdown": (trainer.World, "shutdown", lambda *a: True),
}
NOTES, RANK = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
under_way: list[str] = []
steps = 0


def note(*what) -> None:
    with open(NOTES / f"rank-{RANK}.jsonl", "a") as file:
        file.write(json.dumps(what) + "\n")


def kill() -> None:
    note("kill", steps, list(under_way))
    os.kill(os.getpid(), signal.SIGKILL)


def do_half(point: str, real, args, options) -> None:
    """Leaves behind what a process leaves that dies in the middle of the call."""
    if point == "remove":
        next(Path(args[0]).iterdir()).unlink()
    elif point == "journal":
        args[0]._file.write(b'{"time_seconds": 17')
        args[0]._file.flush()
    else:
        real(*args, **options)
        if point.startswith("write"):
            os.truncate(args[1], Path(args[1]).stat().st_size // 2)


def strike(fault: dict, real=None, args=(), options=None) -> None:
    if fault["do"] == "kill":
        kill()
    elif fault["do"] == "kill halfway":
        do_half(fault["at"], real, args, options)
        kill()
    elif fault["do"] == "kill later":
        threading.Timer(fault["seconds"], kill).start()
    elif fault["do"] == "signals":
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
    elif fault["do"].startswith("raise"):
        raise (trainer.ReplicaError if "user" in fault["do"] else RuntimeError)("a planted fault")
    else:
        time.sleep(fault["seconds"])


def plant(point: str, faults: list[dict]) -> None:
    owner, name, counts = POINTS[point]
    real, calls = getattr(owner, name), 0

    def planted(*args, **options):
        nonlocal calls
        global steps
        if not counts(*args, **options):
            return real(*args, **options)
        calls += 1
        under_way.append(point)
        try:
            for fault in faults:
                if fault["call"] == calls:
                    strike(fault, real, args, options)
            result = real(*args, **options)
            steps = args[0].step if point == "step" else steps
            return result
        finally:
            under_way.pop()

    setattr(owner, name, planted)


def note_batches(faults: list[dict]) -> None:
    batches_of = Loader.batches

    def noted(self, first_batch_number=0):
        for calls, batch in enumerate(batches_of(self, first_batch_number), start=1):
            for fault in faults:
                if fault["call"] == calls:
                    strike(fault)
            note("batch", batch.number, batch.sample_ids.tolist())
            yield batch

    Loader.batches = noted


def main() -> int:
    faults = [fault for fault in json.loads(sys.argv[2]) if fault["rank"] == RANK]
    for point in POINTS:
        plant(point, [fault for fault in faults if fault["at"] == point])
    note_batches([fault for fault in faults if fault["at"] == "data"])
    atexit.register(note, "end")
    for fault in faults:
        if fault["at"] == "exit":
            atexit.register(strike, fault)
    sys.argv = [sys.argv[0], *sys.argv[3:]]
    status = command.main()
    note("exit", status)
    return status


if __name__ == "__main__":
    run(main)
