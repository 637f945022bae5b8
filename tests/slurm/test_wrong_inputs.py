"""Jobs that cannot work end within seconds, with one clear line in their own log."""

import time

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
SCRIPT = "slurm/train_imagenet128.sh"
SMALL = ["run.device=cpu", "model.num_classes=3", "tracking.enabled=false"]


@pytest.fixture
def refused(cluster, tiny_shards, tmp_path):
    """Function (arguments) -> the log's lines that begin with `error: ` of a job that must fail soon."""

    def submit(*arguments: object, flags: tuple[str, ...] = (), **environment: str) -> list[str]:
        places = {"RUN_DIR": str(tmp_path / "run"), "SHARDS": str(tiny_shards), "PROCESSES_PER_NODE": "1"}
        job = cluster.sbatch(*flags, SCRIPT, *arguments, **places | environment)
        cluster.wait_for(job, "RUNNING", "FAILED")
        started = time.monotonic()
        try:
            assert cluster.wait_for_end(job, 120) == "FAILED", cluster.tell(job)
        finally:
            cluster.ask("scancel", job)
        assert time.monotonic() - started < 90  # seconds on a machine of its own
        return [line for line in cluster.log(job).splitlines() if line.startswith("error: ")]

    return submit


def test_a_missing_configuration(refused):
    (line,) = refused("configs/imagenet129.yaml", *SMALL)
    assert line.startswith("error: no configuration configs/imagenet129.yaml in ")


def test_a_run_directory_in_which_another_job_trains(refused, cluster, tmp_path):
    """The other one stands in for a training: it holds the lock, and a file in it names the job."""
    lock = tmp_path / "run" / "training.lock"
    lock.parent.mkdir()
    write = f"""echo '{{"slurm_job": "'$SLURM_JOB_ID'"}}' >{lock}"""
    other = cluster.sbatch("--nodes=1", f"--wrap={write}; flock {lock} sleep 600")
    cluster.wait_until(lambda: lock.exists() and lock.read_text(), 60, other)
    try:
        (line,) = refused("configs/demo.yaml", *SMALL, flags=("--nodes=1",))
    finally:
        cluster.ask("scancel", other)
    assert line.startswith(f"error: RUN_DIR={tmp_path}/run is trained by job {other}, which runs; sbatch --dependency=")


@pytest.mark.slow
def test_shards_that_do_not_exist(refused):
    lines = refused("configs/demo.yaml", *SMALL, SHARDS="/nowhere/shards")
    assert lines[0].startswith("error: /nowhere/shards holds no manifest.json") and len(lines) == 2


@pytest.mark.slow
def test_a_run_directory_that_the_nodes_do_not_share(refused, cluster, own_machines, tmp_path):
    (tmp_path / "run").mkdir()
    cluster.on_node(2, "mount", "-t", "tmpfs", "none", tmp_path / "run")
    try:
        lines = refused("configs/demo.yaml", *SMALL)
    finally:
        cluster.on_node(2, "umount", tmp_path / "run")
    assert lines[0].startswith(f"error: RUN_DIR={tmp_path}/run is not the same directory on node2 as on the first node")


@pytest.mark.slow
def test_a_node_without_accelerate(refused, cluster, own_machines):
    launcher = cluster.launcher
    cluster.on_node(2, "mount", "--bind", "/dev/null", launcher)
    try:
        lines = refused("configs/demo.yaml", *SMALL)
    finally:
        cluster.on_node(2, "umount", launcher)
    assert lines[0].startswith("error: no accelerate on node2; `make setup`")
