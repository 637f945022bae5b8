"""Training processes that stream from a real Ceph RGW: killed, resumed on other numbers of processes, let down."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline import checkpoint, s3_store
from pipeline.order import Plan, rank_rows
from pipeline.upload import upload

REPO = Path(__file__).resolve().parents[2]
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))
WORKER = str(Path(__file__).with_name("stream_worker.py"))
BATCH = 8

YAML = """
run: {{name: streamed, dir: {directory}, device: cpu}}
data: {{shards: "{shards}", num_workers: 1, cache_dir: {directory}/cache}}
model: {{resolution: 16, num_classes: 3, attention_resolution: 8, g_channels: 2, d_channels: 4, z_dim: 8}}
train:
  {{steps: 24, num_d_steps: 2, global_batch_size: 8, log_every_steps: 1, checkpoint_every_steps: 4,
  sample_every_steps: 100}}
tracking: {{enabled: false}}
"""

pytestmark = pytest.mark.s3


@pytest.fixture
def remote(set_of_40_blocks, s3_bucket):
    location = s3_bucket()
    upload(Path(set_of_40_blocks.location), location)
    return location


@pytest.fixture
def configuration(tmp_path, remote):
    path = tmp_path / "config.yaml"
    path.write_text(YAML.format(directory=tmp_path, shards=remote))
    return path


def start(num_processes, configuration, notes, *overrides):
    notes.mkdir()
    launcher = [ACCELERATE, "launch", "--config_file", str(REPO / "configs/accelerate/cpu_two_processes.yaml"),
                "--num_processes", str(num_processes)]  # fmt: skip
    command = [*(launcher if num_processes > 1 else [sys.executable]), WORKER, str(configuration), str(notes)]
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(REPO)
    with open(notes / "log", "w") as log:
        return subprocess.Popen([*command, *overrides], env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=REPO)


def finish(job, notes, seconds=240):
    try:
        job.wait(seconds)
    finally:
        for process in [*psutil.Process(job.pid).children(recursive=True)] if job.poll() is None else []:
            process.kill()
        job.kill()
    return job.returncode, (notes / "log").read_text()


def batches_seen(notes, world_size):
    """Global batches by number, from the lines of all ranks; a number that a rank saw twice must be the same twice."""
    parts = {}
    for rank in range(world_size):
        for line in (notes / f"rank-{rank}.jsonl").read_text().splitlines():
            number, ids = json.loads(line)
            assert parts.setdefault((number, rank), ids) == ids
    whole = {number for number, _ in parts if all((number, rank) in parts for rank in range(world_size))}
    return {number: [i for rank in range(world_size) for i in parts[number, rank]] for number in whole}


def wait_for_batch(job, notes, batch):
    deadline = time.monotonic() + 200
    pattern = re.compile(rf"^\[{batch},", re.MULTILINE)
    while not ((notes / "rank-0.jsonl").exists() and pattern.search((notes / "rank-0.jsonl").read_text())):
        assert job.poll() is None and time.monotonic() < deadline, (notes / "log").read_text()
        time.sleep(0.01)


def kill_after(job, notes, batch):
    """SIGKILL to the last rank once it was handed this batch."""
    wait_for_batch(job, notes, batch)
    started = psutil.Process(job.pid)
    ranks = [child for child in [started, *started.children(recursive=True)] if WORKER in child.cmdline()]
    ranks[-1].kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_resumed_on_other_numbers_of_processes_it_reads_the_same_samples(
    configuration, set_of_40_blocks, tmp_path
):
    """2 processes killed in the first epoch, 1 killed in the second, 4 to the end; 30 batches are an epoch."""
    seen = {}
    for world_size, last_batch in ((2, 21), (1, 34), (4, None)):
        notes = tmp_path / f"notes-{world_size}"
        job = start(world_size, configuration, notes)
        if last_batch is not None:
            kill_after(job, notes, last_batch)
        status, log = finish(job, notes)
        assert (status == 0) == (last_batch is None), log
        found = batches_seen(notes, world_size)
        repeated = seen.keys() & found.keys()
        assert all(seen[number] == found[number] for number in repeated)
        assert not seen or (repeated and min(found) > 0), "goes on from a checkpoint, not from the beginning"
        seen |= found
    plan = Plan(set_of_40_blocks.index.block_first_sample, 0, BATCH)
    assert seen == {number: plan.batch_sample_ids(number).tolist() for number in range(48)}
    epoch = sorted(sample for number in range(30) for sample in seen[number])
    assert epoch == list(range(240))
    assert "resuming on 4 process(es) what ran on 1" in log
    assert re.search(r"step 24/24 .* MB/s fetched, cache \d", log)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_epoch_goes_on_when_the_store_is_killed_and_started_again(
    configuration, set_of_40_blocks, s3_server, tmp_path
):
    """Its blocks come over the epoch: 2 partitions of 20 blocks each, fetched 4 ahead."""
    notes = tmp_path / "notes"
    job = start(2, configuration, notes, "train.global_batch_size=2", "train.num_d_steps=1", "train.steps=120")
    wait_for_batch(job, notes, 3)
    s3_server.kill()
    time.sleep(10)
    s3_server.start()
    status, log = finish(job, notes)
    assert status == 0, log
    plan = Plan(set_of_40_blocks.index.block_first_sample, 0, 2)
    assert batches_seen(notes, 2) == {number: plan.batch_sample_ids(number).tolist() for number in range(120)}
    assert sum(int(count) for count in re.findall(r"(\d+) retries", log)) > 0


@pytest.mark.timeout(300)
def test_a_rank_whose_data_fails_ends_the_job_with_the_name_of_the_block(
    configuration, remote, set_of_40_blocks, tmp_path
):
    """A block that only rank 1 reads, and not at once, is damaged in the store."""
    index, plan = set_of_40_blocks.index, Plan(set_of_40_blocks.index.block_first_sample, 0, BATCH)
    blocks = [[set(plan.batch_blocks(n, rank_rows(BATCH, 1, rank, 2)).tolist()) for n in range(30)] for rank in (0, 1)]
    early = set.union(*blocks[1][:6], *blocks[0])
    block = min(set.union(*blocks[1]) - early)
    shard = set_of_40_blocks.manifest.shards[index.block_shard[block]].name
    data = bytearray((Path(set_of_40_blocks.location) / shard).read_bytes())
    data[int(index.block_start[block]) + 600] ^= 1
    where = s3_store.parse(remote)
    s3_store.client(where).put_object(Bucket=where.bucket, Key=where.key(shard), Body=bytes(data))

    notes = tmp_path / "notes"
    job = start(2, configuration, notes, "train.num_d_steps=1")
    deadline = time.monotonic() + 200
    while not (notes / "rank-1.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    begin = time.monotonic()
    status, log = finish(job, notes)
    assert status != 0 and time.monotonic() - begin < 60
    assert re.search(rf"\[rank 1\] error: .*{shard}: block {block} .*expected sha256 .*, got", log), log
    first_bad = next(number for number in range(30) if block in blocks[1][number])
    assert max(batches_seen(notes, 2), default=-1) == first_bad - 1
    path, problems = checkpoint.newest(tmp_path / "streamed")
    assert problems == [] and (path is None or checkpoint.step_of(path) <= first_bad)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed={rank}", r"run.seed: 0 on rank 0, 1 on rank 1"),
        ("model.z_dim=8{rank}", r"model.z_dim: 80 on rank 0, 81 on rank 1"),
    ],
)
def test_ranks_that_were_started_differently_are_told_before_the_first_step(
    configuration, tmp_path, override, expected
):
    notes = tmp_path / "notes"
    status, log = finish(start(2, configuration, notes, override), notes)
    assert status != 0 and re.search(expected, log), log
    assert "[rank 1] error: the ranks were not started alike" in log or "error: the ranks were not started" in log
    assert not list(notes.glob("rank-*.jsonl"))
