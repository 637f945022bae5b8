"""`sbatch slurm/train_imagenet128.sh` on a real Slurm of two nodes, which stream from S3 and track to MLflow."""

import re
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline import checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
SCRIPT = "slurm/train_imagenet128.sh"
STEPS = 400
# Milliseconds a step, on one process a node.
SMALL = ["configs/demo.yaml", "run.device=cpu", "model.num_classes=3", "model.g_channels=2", "model.d_channels=4",
         "train.global_batch_size=8", "train.log_every_steps=10", "train.checkpoint_every_steps=50",
         "train.sample_every_steps=1000", "evaluation.num_images=64", f"train.steps={STEPS}"]  # fmt: skip


def test_the_header_is_accepted_as_it_is(cluster):
    done = cluster.command("sbatch", "--test-only", SCRIPT)
    assert done.returncode == 0 and "64 processors" not in done.stdout, done.stderr
    assert "using 128 processors on nodes node[1-2] in partition main" in done.stderr


@pytest.fixture(scope="session")
def stored_shards(new_location, tiny_shards) -> str:
    from pipeline.upload import upload

    location = new_location()
    upload(tiny_shards, location)
    return location


@pytest.fixture(scope="session")
def start(cluster, stored_shards, mlflow_uri, tmp_path_factory):
    """Function (name, sbatch flags, overrides) -> (job, run directory) of a small training."""
    root = tmp_path_factory.mktemp("runs")

    def start(name: str, flags: tuple[str, ...] = (), overrides: tuple[str, ...] = ()) -> tuple[str, Path]:
        places = {"RUN_DIR": str(root / name), "SHARDS": stored_shards, "MLFLOW_TRACKING_URI": mlflow_uri}
        cache = f"data.cache_dir={root}/blocks-{name}"
        job = cluster.sbatch(*flags, SCRIPT, *SMALL, cache, *overrides, **places, PROCESSES_PER_NODE="1")
        return job, root / name

    return start


@pytest.fixture(scope="session")
def undisturbed(cluster, start):
    job, run_dir = start("undisturbed")
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.tell(job)
    return job, run_dir


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
    assert "finished: 400 steps are done" in cluster.log(job)
    run, steps = mlflow_run(mlflow_uri, run_dir)
    assert run.info.status == "FINISHED"
    assert steps == list(range(10, STEPS + 1, 10))
    tags = run.data.tags
    assert (tags["world_size"], tags["hostnames"]) == ("2", "node1 node2")
    assert (tags["slurm.job_id"], tags["slurm.nodes"], tags["slurm.restarts"]) == (job, "node[1-2]", "0")
    assert f"slurm: job_id {job}, nodes node[1-2], restarts 0" in node_log(run_dir, job)
    assert run.data.metrics["data/fetched_bytes"] > 0 if "data/fetched_bytes" in run.data.metrics else True
    for node in (0, 1):
        assert f"=== start {job}.0 on node{node + 1}" in node_log(run_dir, job, node)
