"""`slurm/evaluate.sh`: beside a training, and after it."""

import shutil
import time

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1200, func_only=True)]


def scored_steps(run_dir) -> set[int]:
    return {int(path.parent.name.removeprefix("step-")) for path in run_dir.glob("evaluations/step-*/*.json")}


def test_an_evaluation_watches_a_training_and_ends_when_that_does(cluster, start):
    """The training is on one node and would not end by itself; the evaluation is on the other."""
    overrides = ("train.steps=1000000", "evaluation.every_steps=200", "train.checkpoint_every_steps=1000")
    train, run_dir = start("watched", ("--nodes=1",), overrides)
    watch = cluster.sbatch("slurm/evaluate.sh", run_dir, WATCH_JOB=train)  # before there is anything to see
    try:
        cluster.wait_until(lambda: 200 in scored_steps(run_dir), 300, watch)
        assert (cluster.state(train), cluster.state(watch)) == ("RUNNING", "RUNNING")
        cluster.ask("scancel", "--batch", "--signal=USR1", watch)  # as Slurm does near the time limit
        cluster.wait_for_restart(watch, 1)
        assert "requeued: time limit or preemption; what is scored stays" in cluster.log(watch)
        cluster.ask("scancel", train)
        assert cluster.wait_for_end(watch, 400) == "COMPLETED", cluster.tell(watch)
    finally:  # else the tests after this one would wait for its nodes
        cluster.ask("scancel", train, watch)
    assert "has left the queue before the last step; its last snapshot is of step" in cluster.log(watch)
    snapshots = {int(path.name.removeprefix("step-")) for path in run_dir.glob("snapshots/step-*")}
    assert scored_steps(run_dir) == snapshots


def test_a_run_is_scored_after_its_end(cluster, undisturbed):
    """Submitted by the script itself, after its check of the inputs."""
    job, run_dir = undisturbed
    flags = f"--output={cluster.logs}/%x-%j.out"
    watch = cluster.ask("slurm/evaluate.sh", run_dir, "evaluation.seed=1", WATCH_JOB=job, SBATCH_FLAGS=flags)
    assert cluster.wait_for_end(watch) == "COMPLETED", cluster.tell(watch)
    assert f"job {job} is over, all snapshots are scored" in cluster.log(watch)
    assert scored_steps(run_dir) == {90}


def test_a_run_that_is_not_there_is_told_before_anything_is_queued(cluster, tmp_path):
    done = cluster.command("slurm/evaluate.sh", tmp_path / "run")
    assert done.returncode == 1 and f"error: {tmp_path}/run is no run: it holds no config.yaml" in done.stderr


def test_a_watch_of_a_finished_run_stays_as_long_as_its_job(cluster, undisturbed, tmp_path):
    """The job may be about to extend the run: until it has begun, DONE and config.yaml tell of the end before."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed[1], run_dir)
    shutil.rmtree(run_dir / "evaluations", ignore_errors=True)
    job = cluster.sbatch("--nodes=1", "--wrap=sleep 600")
    cluster.wait_for(job, "RUNNING")
    watch = cluster.sbatch("slurm/evaluate.sh", run_dir, "tracking.enabled=false", WATCH_JOB=job)
    cluster.wait_for(watch, "RUNNING")
    time.sleep(30)
    state = cluster.state(watch)
    cluster.ask("scancel", job)
    assert state == "RUNNING" and scored_steps(run_dir) == set()
    assert cluster.wait_for_end(watch) == "COMPLETED", cluster.tell(watch)
    assert scored_steps(run_dir) == {90}
