"""`sbatch slurm/train_imagenet128.sh` on a real Slurm of two nodes, which stream from S3 and track to MLflow.

Starting two processes takes longest here, so each job goes through several events, and what a job that lost a node has
to wait in the queue passes during other tests.
"""

import contextlib
import re
import shutil
import time
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from pipeline import checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900, func_only=True)]
SCRIPT = "slurm/train_imagenet128.sh"
STEPS = 90  # of `undisturbed`


def test_the_header_is_accepted_as_it_is(cluster):
    done = cluster.command("sbatch", "--test-only", SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "using 128 processors on nodes node[1-2] in partition main" in done.stderr


def weights(run_dir: Path) -> dict[str, str]:
    return checkpoint.digests(checkpoint.load(run_dir / "checkpoints" / f"step-{STEPS:08d}").networks)


def mlflow_run(uri: str, run_dir: Path):
    client = MlflowClient(uri)
    found = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()],
        f"attributes.run_name = '{run_dir.name}'",
    )
    assert len(found) == 1, "one MLflow run through all restarts"
    points = client.get_metric_history(found[0].info.run_id, "train/d_loss")
    return found[0], sorted(point.step for point in points)


def node_log(run_dir: Path, job: str, node: int = 0) -> str:
    path = run_dir / "logs" / f"{job}-node{node}.log"
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_two_nodes_train_to_the_end_from_s3_and_tell_mlflow(cluster, undisturbed, mlflow_uri):
    job, run_dir = undisturbed
    assert (run_dir / "DONE").read_text() == f"{STEPS}\n"
    assert f"finished: {STEPS} steps are done" in cluster.log(job)
    run, steps = mlflow_run(mlflow_uri, run_dir)
    assert run.info.status == "FINISHED"
    assert steps == list(range(5, STEPS + 1, 5))
    tags = run.data.tags
    assert tags["world_size"] == "2"
    assert len(tags["hostnames"].split()) == (2 if cluster.has_namespaces else 1)
    assert (tags["slurm.job_id"], tags["slurm.nodes"], tags["slurm.restarts"]) == (job, "node[1-2]", "0")
    assert f"slurm: job_id {job}, nodes node[1-2], restarts 0" in node_log(run_dir, job)
    for node in (0, 1):
        assert f"=== start {job}.0 on node{node + 1}" in node_log(run_dir, job, node)


def step_of(cluster, run_dir: Path, job: str) -> int:
    """The last step that the job has told since its last start."""
    _, started, told = node_log(run_dir, job).rpartition(f"=== start {job}.{cluster.facts(job)['Restarts']} ")
    return max(map(int, re.findall(r"^step (\d+)/", told, re.MULTILINE)), default=0) if started else 0


def saved_step(run_dir: Path) -> int:
    return checkpoint.step_of(checkpoint.published(run_dir)[-1])


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    wanted = f"run.name={run_dir.name}"
    found = [process for process in psutil.process_iter(["cmdline"]) if wanted in (process.info["cmdline"] or ())]
    return [process for process in found if process.info["cmdline"][1:3] == ["-u", "launch/train.py"]]


@contextlib.contextmanager
def frozen_at(cluster, run_dir: Path, job: str, step: int):
    """Stops the ranks soon after a step, so that however fast they are what happens next happens there."""
    deadline = time.monotonic() + 240
    while step_of(cluster, run_dir, job) < step:
        assert cluster.state(job) in ("PENDING", "RUNNING"), cluster.tell(job)
        assert time.monotonic() < deadline, f"no step {step}: {cluster.tell(job)} {node_log(run_dir, job)}"
        time.sleep(0.2)
    ranks = ranks_of(run_dir)
    assert len(ranks) == 2
    for rank in ranks:
        rank.suspend()
    try:
        yield ranks
    finally:
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.resume()


def wait_for_line(cluster, job: str, line: str, times: int = 1) -> None:
    cluster.wait_until(lambda: cluster.log(job).count(line) == times, 120, job)


def assert_as_undisturbed(cluster, undisturbed, mlflow_uri, job: str, run_dir: Path, restarts: int) -> None:
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.tell(job)
    assert weights(run_dir) == weights(undisturbed[1])
    run, steps = mlflow_run(mlflow_uri, run_dir)
    assert steps == sorted(set(steps)) and set(steps) >= set(range(5, STEPS + 1, 5)), "no doubled or lost steps"
    assert (run.info.status, run.data.tags["slurm.restarts"]) == ("FINISHED", str(restarts))
    assert node_log(run_dir, job).count("resumed from") == restarts


@pytest.fixture(scope="module")
def struck(cluster, start, undisturbed):
    """A job that had a crash after a checkpoint, an admin's requeue, and the death of a node; held in the queue."""
    job, run_dir = start("struck", ("--partition=preempt",))
    with frozen_at(cluster, run_dir, job, 25) as ranks:
        ranks[0].kill()
    cluster.wait_for_restart(job, 1)
    assert "requeued: a crash, with a newer checkpoint (20) than at the start (0)" in cluster.log(job)

    with frozen_at(cluster, run_dir, job, 25):
        cluster.ask("scontrol", "requeue", job)
    cluster.wait_for_restart(job, 2)
    assert 25 <= saved_step(run_dir) < 40, "SIGTERM saved one"

    with frozen_at(cluster, run_dir, job, saved_step(run_dir) + 5):
        cluster.kill_node(2)
    # No short cut now: a new run on the returned node can be hit by the end of the old one.
    cluster.wait_for(job, "PENDING")
    cluster.ask("scontrol", "hold", job)
    cluster.start_node(2)
    return job, run_dir


@pytest.mark.slow
def test_a_time_limit_and_a_preemption_change_nothing(cluster, start, undisturbed, struck, mlflow_uri):
    job, run_dir = start("warned", ("--partition=preempt",))
    asked = "SIGUSR1: time limit or preemption; the trainer is asked for a checkpoint"
    with frozen_at(cluster, run_dir, job, 10):
        cluster.ask(
            "scontrol", "update", f"jobid={job}", "timelimit=5"
        )  # the header asks for USR1 300 s before the end
        wait_for_line(cluster, job, asked)
    cluster.wait_for_restart(job, 1, before=("timelimit=60",))
    assert f"requeued: time limit or preemption, checkpoint {saved_step(run_dir)}" in cluster.log(job)

    with frozen_at(cluster, run_dir, job, saved_step(run_dir) + 5):
        other = cluster.sbatch("--partition=main", "--nodes=2", "--exclusive", "--wrap=sleep 1")
        wait_for_line(cluster, job, asked, 2)
    assert cluster.wait_for_end(other) == "COMPLETED"
    cluster.wait_for_restart(job, 2)
    assert cluster.log(job).count("requeued: time limit or preemption, checkpoint") == 2
    assert_as_undisturbed(cluster, undisturbed, mlflow_uri, job, run_dir, 2)


@pytest.mark.slow
def test_a_crash_an_admins_requeue_and_the_death_of_a_node_change_nothing(cluster, struck, undisturbed, mlflow_uri):
    job, run_dir = struck
    cluster.ask("scontrol", "release", job)
    cluster.wait_for(job, "RUNNING", seconds=300)
    assert_as_undisturbed(cluster, undisturbed, mlflow_uri, job, run_dir, 3)
    assert cluster.log(job).count("requeued: ") == 1, "a node's death is no crash"


@pytest.mark.slow
def test_scancel_is_for_good_and_the_same_command_goes_on(cluster, start):
    job, run_dir = start("cancelled")
    with frozen_at(cluster, run_dir, job, 5):
        cluster.ask("scancel", job)
    assert cluster.wait_for_end(job) == "CANCELLED"
    saved = saved_step(run_dir)

    # Meanwhile it could have come back. A crash before the next checkpoint is not tried again.
    next_job, _ = start("cancelled", (), ("train.checkpoint_every_steps=1000",))
    with frozen_at(cluster, run_dir, next_job, saved + 5) as ranks:
        ranks[0].kill()
    assert cluster.wait_for_end(next_job) == "FAILED"
    assert f"no newer checkpoint than {saved}, so it is not tried again" in cluster.log(next_job)
    assert cluster.state(job) == "CANCELLED" and "requeued" not in cluster.log(job) + cluster.log(next_job)

    # One after a checkpoint would be, but not more than MAX_REQUEUES times.
    next_job, _ = start("cancelled", (), ("train.checkpoint_every_steps=5",), MAX_REQUEUES="0")
    with frozen_at(cluster, run_dir, next_job, saved + 15) as ranks:
        ranks[0].kill()
    assert cluster.wait_for_end(next_job) == "FAILED"
    assert "a crash, with a newer checkpoint" in cluster.log(next_job)
    assert "MAX_REQUEUES=0 is reached; the same command goes on from step" in cluster.log(next_job)


@pytest.mark.slow
def test_a_finished_run_says_so_and_an_extended_one_goes_on(cluster, start, undisturbed):
    """In between the trainer refuses what the check before it cannot see; its message is in the job's log."""
    more, run_dir = f"train.steps={STEPS + 10}", undisturbed[1].with_name("extended")
    shutil.copytree(undisturbed[1], run_dir)  # other tests look at the original
    job, _ = start("extended")
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert f"finished: {STEPS} steps are done; a larger train.steps goes on" in cluster.log(job)
    assert "ended with status" not in cluster.log(job), "nothing was started"

    job, _ = start("extended", (), (more, "optimizer.lr_g=0.5"))
    assert cluster.wait_for_end(job) == "FAILED"
    told = cluster.log(job)
    assert told.count("step-00000090 was made with other hyperparameters:\n  optimizer.lr_g: 0.0003 -> 0.5\n") == 1
    assert f"no newer checkpoint than {STEPS}, so it is not tried again" in told and "Traceback" not in told

    job, _ = start("extended", (), (more,))
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert f"from step {STEPS} to {STEPS + 10}" in cluster.log(job)
    assert (run_dir / "DONE").read_text() == f"{STEPS + 10}\n"
