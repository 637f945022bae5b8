"""What a scheduler does to a job, and a launcher to its ranks: all save once, at one step, and end with status 0."""

import json
import re
import signal
import time

import pytest

from pipeline import checkpoint


def stopped(job, run_dir, reason: str) -> None:
    """Every rank ended by itself with status 0 after one whole checkpoint; the time it took is on record."""
    for rank in (0, 1):
        assert [line for line in job.notes(rank) if line[0] in ("exit", "end")] == [["exit", 0], ["end"]], job.log()
    path, problems = checkpoint.newest(run_dir)
    assert checkpoint.published(run_dir) == [path] and problems == []
    assert not (run_dir / "samples").exists(), "no time for pictures that are not due"
    step = checkpoint.step_of(path)
    said = re.search(rf"stopped by {reason} at step {step}, checkpoint published (\d+\.\d) s after", job.log())
    assert said, job.log()
    points = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    measured = [(point["step"], point["metrics"]["time/stop_seconds"]) for point in points
                if "time/stop_seconds" in point.get("metrics", {})]  # fmt: skip
    assert measured == [(step, pytest.approx(float(said[1]), abs=0.051))]
    assert 0 < measured[0][1] < 60


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["USR1", "TERM"]
)
def test_signals_to_all_processes_at_once_as_a_scheduler_sends_them(start_job, run_dir, number):
    """To ranks, loader workers and the process that sends to MLflow, three times; the launcher is spared."""
    job = start_job([], "data.num_workers=1", "tracking.enabled=true")
    job.wait_for("step 3/")
    assert len(job.processes) >= 1 + 2 + 2 + 1
    for _ in range(3):
        for process in job.processes[1:]:
            if process.is_running():
                process.send_signal(number)
    assert job.wait() == 0, job.log()
    stopped(job, run_dir, number.name)


def test_signals_at_every_later_moment_change_nothing(start_job, run_dir):
    """Rank 1 is asked to stop in its third step, then each rank twice and thrice while it saves and winds down."""
    moments = [(1, "step", 3), (0, "write", 2), (0, "write optimizer", 1), (0, "sync", 2), (0, "publish", 1),
               (0, "close", 1), (0, "shutdown", 1), (1, "shutdown", 1), (0, "exit", 1), (1, "exit", 1)]  # fmt: skip
    job = start_job([{"rank": rank, "at": at, "call": call, "do": "signals"} for rank, at, call in moments])
    assert job.wait() == 0, job.log()
    stopped(job, run_dir, "SIGUSR1")


@pytest.mark.slow
def test_a_signal_during_start_up_leads_to_one_step_and_a_checkpoint(start_job, run_dir):
    job = start_job([{"rank": 1, "at": "open", "call": 1, "do": "signals"}])
    assert job.wait() == 0, job.log()
    stopped(job, run_dir, "SIGUSR1")
    assert [path.name for path in checkpoint.published(run_dir)] == ["step-00000001"]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGTERM, "SIGTERM"),  # the launcher sends it on, waits half a minute and then kills
        (signal.SIGUSR1, "the end of its launcher"),  # it dies of it at once and tells nobody
        pytest.param(signal.SIGKILL, "the end of its launcher", marks=pytest.mark.slow),
    ],
    ids=["TERM", "USR1", "KILL"],
)
def test_a_signal_to_the_launcher_alone(start_job, run_dir, number, reason):
    job = start_job([])
    job.wait_for("step 3/")
    job.processes[0].send_signal(number)
    assert job.wait() != 0, "the launcher was told to end; DONE and checkpoints say how far training got"
    stopped(job, run_dir, reason)


@pytest.mark.slow
def test_a_launcher_that_ignores_usr1_reports_success(start_job, run_dir):
    """As slurm's batch script starts it: `trap "" USR1` is inherited by the launcher, the ranks install their own."""
    job = start_job([], before=("sh", "-c", 'trap "" USR1; exec "$@"', "sh"))
    job.wait_for("step 3/")
    for process in job.processes:
        process.send_signal(signal.SIGUSR1)
    assert job.wait() == 0, job.log()
    stopped(job, run_dir, "SIGUSR1")


# This very process may have been started to ignore Ctrl-C, which its children would inherit.
HEARS_CTRL_C = ("env", "--default-signal=INT")


def test_ctrl_c_reaches_all_processes_and_saves(start_job, run_dir):
    """The terminal sends it to launcher, ranks and workers; the launcher sends it on to the ranks once more."""
    job = start_job([], "data.num_workers=1", "tracking.enabled=true", before=HEARS_CTRL_C)
    job.wait_for("step 3/")
    for process in job.processes:
        process.send_signal(signal.SIGINT)
    job.wait()
    stopped(job, run_dir, "SIGINT")
    assert job.log().count("saving a checkpoint after this step, then ending; again: ending at once") == 1


def test_a_second_ctrl_c_ends_at_once(start_job, run_dir):
    faults = [{"rank": 0, "at": "step", "call": 3, "do": "sleep", "seconds": 100}]
    job = start_job(faults, launcher="none", before=HEARS_CTRL_C)
    job.wait_for("step 2/")
    job.processes[0].send_signal(signal.SIGINT)
    time.sleep(6)
    job.processes[0].send_signal(signal.SIGINT)
    assert job.wait(30) == 130
    assert checkpoint.published(run_dir) == []
    assert "stopped; what is finished stays" in job.log()
    assert "Traceback" not in job.log()


@pytest.mark.slow
def test_ctrl_c_passes_a_job_by_that_was_started_to_ignore_it(start_job, run_dir):
    job = start_job([], launcher="none", before=("env", "--ignore-signal=INT"))
    job.wait_for("step 3/")
    job.processes[0].send_signal(signal.SIGINT)
    time.sleep(1)
    job.processes[0].send_signal(signal.SIGTERM)
    assert job.wait() == 0
    assert "stopped by SIGTERM" in job.log()
    assert "Ctrl-C" not in job.log()


@pytest.mark.slow
def test_a_second_training_in_the_directory_waits_until_the_first_is_dead_and_goes_on(start_job, run_dir):
    first = start_job([], "train.checkpoint_every_steps=5")
    first.wait_for("step 6/")
    second = start_job([], "train.steps=20")
    second.wait_for("waiting for its end, 100 s at most")
    rank_0 = first.ranks()[0].pid
    assert f"{run_dir} is trained by process {rank_0} on " in second.log()
    first.kill()
    assert second.wait() == 0, second.log()
    assert re.search(r"resumed from \S+/step-\d{8}", second.log())
    assert second.log().count("is trained by process") == 1


@pytest.mark.slow
def test_batch_norm_of_each_ranks_own_can_be_saved_and_resumed(start_job, run_dir):
    overrides = ["model.sync_batch_norm=false", "train.checkpoint_every_steps=2"]
    assert start_job([], *overrides, "train.steps=2").wait() == 0
    job = start_job([], *overrides, "train.steps=4")
    assert job.wait() == 0, job.log()
    assert "resumed from" in job.log() and checkpoint.step_of(checkpoint.newest(run_dir)[0]) == 4
