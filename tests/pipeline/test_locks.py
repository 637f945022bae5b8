"""One training at a time in a run directory, whatever became of the one before."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline import locks
from pipeline.locks import RunTakenError, exclusive, only_training

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.locks import only_training
with only_training(Path(sys.argv[1]), print, lambda: True):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def holder(tmp_path, repo_root):
    """Another process that trains in tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=repo_root, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def take(run_dir) -> list[str]:
    """Takes the directory and lets it go; returns what was told."""
    told = []
    with only_training(run_dir, told.append, lambda: True):
        return told


def test_a_second_training_is_refused_with_the_name_of_the_first(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locks, "_WAIT_SECONDS", 1.0)
    told = []
    with pytest.raises(RunTakenError) as refused, only_training(tmp_path, told.append, lambda: True):
        pass
    assert f"is trained by process {holder.pid} on " in str(refused.value)
    assert "choose another run.name" in str(refused.value)
    assert f"remove {tmp_path}/training.lock" in str(refused.value)
    assert len(told) == 1
    assert f"process {holder.pid}" in told[0] and "waiting for its end, 1 s at most" in told[0]


def test_waiting_ends_when_it_is_not_worth_it(tmp_path, holder):
    answers = iter([True, True, False])
    with pytest.raises(RunTakenError), only_training(tmp_path, print, lambda: next(answers)):
        pass
    assert next(answers, None) is None


def test_a_killed_training_leaves_nothing_to_wait_for(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert take(tmp_path) == []
    assert take(tmp_path) == []


def test_a_training_that_ended_holds_nothing_by_name(tmp_path):
    with only_training(tmp_path, print, lambda: True):
        assert json.loads((tmp_path / "training.lock").read_text())["host"]
    assert (tmp_path / "training.lock").read_text() == ""


def test_the_way_out_that_the_message_names(tmp_path, holder):
    (tmp_path / "training.lock").unlink()
    assert take(tmp_path) == []


@pytest.mark.parametrize(
    ("earlier", "now", "waited_for"),
    [(("7", "0"), ("7", "1"), False), (("7", "1"), ("7", "1"), True), (("7", "0"), ("8", "1"), True),
     (("", "0"), ("", "1"), True)],
    ids=["requeued", "started twice in a job", "another job", "no job"],
)  # fmt: skip
def test_an_earlier_start_of_the_same_slurm_job_is_gone(earlier, now, waited_for, tmp_path, holder, monkeypatch):
    """Even where its machine died and the file system has not noticed."""
    monkeypatch.setattr(locks, "_WAIT_SECONDS", 0.0)
    job, restarts = earlier
    text = {"host": "dead", "process": 1, "slurm_job": job, "slurm_restarts": int(restarts)}
    (tmp_path / "training.lock").write_text(json.dumps(text) + "\n")
    monkeypatch.setenv("SLURM_JOB_ID", now[0])
    monkeypatch.setenv("SLURM_RESTART_COUNT", now[1])
    if waited_for:
        with pytest.raises(RunTakenError, match="is trained by process 1 on dead"):
            take(tmp_path)
    else:
        with only_training(tmp_path, print, lambda: True), pytest.raises(RunTakenError, match="Slurm job 7"):
            monkeypatch.setenv("SLURM_JOB_ID", "8")
            take(tmp_path)  # what it went past is its own now


def test_without_locks_in_the_file_system_nothing_waits(tmp_path, holder, monkeypatch):
    def unsupported(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    assert take(tmp_path) == []
    with exclusive(tmp_path / "some" / "lock"):
        pass


def test_exclusive_blocks_never_overlap(tmp_path):
    inside, most = [], []

    def enter(number: int) -> None:
        with exclusive(tmp_path / "new" / "lock"):
            inside.append(number)
            most.append(len(inside))
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(200)))
    assert most == [1] * 200
