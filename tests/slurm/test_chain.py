"""slurm/submit_all.sh: a job array builds, one job merges, training and evaluation wait for it."""

import pytest

from pipeline.manifest import open_shard_set

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900, func_only=True)]
slow = pytest.mark.slow
SMALL = ["configs/demo.yaml", "run.device=cpu", "model.num_classes=3", "model.g_channels=2", "model.d_channels=4",
         "train.global_batch_size=8", "train.steps=10", "tracking.enabled=false"]  # fmt: skip


@pytest.fixture
def chain(cluster, tiny_shards, tmp_path):
    """Function (environment) -> ids of the merge, training and evaluation jobs of a small chain of four parts."""

    def submit(**environment: str) -> list[str]:
        flags = f"--output={cluster.logs}/%x-%j.out"
        small = f"{flags} --cpus-per-task=1"
        places = {"SOURCE": str(tiny_shards.parent / "images"), "SHARDS": str(tmp_path / "shards"), "PARTS": "4"}
        places |= {"RUN_DIR": str(tmp_path / "runs/chain"), "PROCESSES_PER_NODE": "1", "BUILD_SBATCH": small}
        places |= {
            "TRAIN_SBATCH": flags,
            "EVALUATE_SBATCH": flags,
            "EVALUATE_ARGUMENTS": "evaluation.num_images=64 evaluation.kid_subset_size=32",
        }
        places |= {"BUILD_ARGUMENTS": "--size 16 --samples-per-shard 12 --workers 1"}
        done = cluster.command("slurm/submit_all.sh", *SMALL, **places | environment)
        assert done.returncode == 0, done.stderr
        for words in ("builds", "merges them", "trains configs/demo.yaml", "scores the last checkpoint"):
            assert words in done.stderr
        return done.stdout.split()

    return submit


def setup_that_fails_once(tmp_path, times: int) -> str:
    """A SETUP file by which part 2 fails so many times."""
    path = tmp_path / "setup.sh"
    path.write_text(f"""
        if [ "${{SLURM_ARRAY_TASK_ID:-}}" = 2 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {times} ]; then
            echo "the file server is away" >&2; return 1
        fi
    """)
    return str(path)


@slow
def test_four_parts_with_one_failing_once_become_a_scored_run(cluster, chain, tmp_path):
    merge, train, score = chain(SETUP=setup_that_fails_once(tmp_path, 1))
    build = cluster.facts(merge)["Dependency"].split(":")[1].split("_")[0]
    cluster.wait_for_restart(f"{build}_2", 1)
    assert cluster.wait_for_end(score, 400) == "COMPLETED", "".join(map(cluster.tell, (merge, train, score)))
    assert "the file server is away" in cluster.all_logs() and "requeued: part 2 of 4" in cluster.all_logs()
    assert len(open_shard_set(str(tmp_path / "shards")).manifest.shards) == 8
    assert (tmp_path / "runs/chain/DONE").read_text() == "10\n"
    assert len(list((tmp_path / "runs/chain/evaluations").glob("step-00000010/*.json"))) == 1


@slow
def test_a_part_that_fails_for_good_cancels_what_waits_for_it(cluster, chain, tmp_path):
    jobs = chain(SETUP=setup_that_fails_once(tmp_path, 99), MAX_REQUEUES="0")
    for job in jobs:
        assert cluster.wait_for_end(job) == "CANCELLED"
    log = cluster.all_logs()
    assert "the file server is away" in log
    assert "part 2 of 4: it failed, see above, and MAX_REQUEUES=0 is reached. What waits for this job" in log
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("environment", "arguments", "told"),
    [
        ({"SOURCE": "/nowhere"}, [], "SOURCE=/nowhere cannot be read"),
        ({}, ["optimizer.lr_gg=1"], "optimizer.lr_gg: unknown key; did you mean optimizer.lr_g?"),
        ({}, ["run.name=other"], "the run directory is RUN_DIR's to say"),
        ({"PARTS": "four"}, [], "PARTS=four is no number"),
        ({"MAX_REQUEUES": "-1"}, [], "MAX_REQUEUES=-1 is no number"),
        pytest.param({"EVALUATE_ARGUMENTS": "train.steps=1"}, [], "'train.steps=1': an evaluation takes", marks=slow),
        pytest.param({"EVALUATE_ARGUMENTS": "--best"}, [], "unrecognized arguments: --best", marks=slow),
    ],
)
def test_wrong_inputs_of_any_stage_are_told_before_anything_is_queued(
    environment, arguments, told, cluster, tiny_shards, tmp_path
):
    places = {"SOURCE": str(tiny_shards.parent / "images"), "SHARDS": str(tmp_path / "shards")}
    places |= {"RUN_DIR": str(tmp_path / "runs/chain"), "SLURM_JOB_ID": "1"}  # from within an interactive job
    before = cluster.ask("squeue", "--noheader", "--states=all")
    done = cluster.command("slurm/submit_all.sh", *SMALL, *arguments, **places | environment)
    assert done.returncode != 0 and told in done.stderr, done.stderr
    assert cluster.ask("squeue", "--noheader", "--states=all") == before


def test_a_machine_that_has_only_a_container_says_that_it_cannot_check(cluster, tmp_path):
    without_python = {"CONTAINER": "sagan.sqsh", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
    done = cluster.command(
        "slurm/train_imagenet128.sh", "--check", *SMALL, RUN_DIR=str(tmp_path / "run"), **without_python
    )
    assert done.returncode == 0 and "the inputs are not checked here" in done.stderr


@pytest.mark.parametrize("script", ["train_imagenet128.sh", "build_shards.sh", "evaluate.sh", "submit_all.sh"])
def test_help_teaches(cluster, repo_root, script):
    done = cluster.command("env", f"--chdir={cluster.logs}", repo_root / "slurm" / script, "--help")
    assert done.returncode == 0 and f"slurm/{script}" in done.stdout and "##" not in done.stdout
    if script != "submit_all.sh":
        job = cluster.sbatch(f"slurm/{script}", "--help")
        assert cluster.wait_for_end(job) == "COMPLETED" and done.stdout in cluster.log(job)
