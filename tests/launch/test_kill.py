"""SIGKILL of one rank of two, twenty times in one run, which ends as the run that was never killed."""

import collections
import json
import random
import time

import pytest
import torch

from pipeline import checkpoint
from pipeline.manifest import open_shard_set
from pipeline.order import Plan, rank_rows

STEPS, BATCH = 240, 8
# A process dies in the middle of each of these or just before it, on the way from one checkpoint to the next.
PLANNED = [
    {"rank": 0, "at": "write", "call": 5, "do": "kill halfway"},
    {"rank": 0, "at": "write optimizer", "call": 3, "do": "kill halfway"},
    {"rank": 0, "at": "sync", "call": 12, "do": "kill"},
    {"rank": 0, "at": "publish", "call": 2, "do": "kill"},
    {"rank": 0, "at": "publish", "call": 2, "do": "kill halfway"},
    {"rank": 0, "at": "prune", "call": 2, "do": "kill"},
    {"rank": 0, "at": "prune", "call": 2, "do": "kill halfway"},
    {"rank": 0, "at": "remove", "call": 2, "do": "kill halfway"},
    {"rank": 0, "at": "journal", "call": 9, "do": "kill halfway"},
]
NUM_KILLS = 20


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_killed_twenty_times_it_is_the_run_that_was_never_killed(start_job, run_dir, tiny_shards, capsys):
    """The last starts go through `accelerate launch`, the others through torch.distributed.run, which is up sooner."""
    overrides = [f"train.steps={STEPS}", "train.checkpoint_every_steps=4", "train.keep_checkpoints=2"]
    whole_job = start_job([], *overrides, "run.name=whole", launcher="torchrun")
    assert whole_job.wait() == 0, whole_job.log()

    draw = random.Random(20)
    # At any moment of the first one and a half seconds of steps, which takes in a few checkpoints.
    anywhere = [
        {"rank": number % 2, "at": "step", "call": 1, "do": "kill later", "seconds": draw.uniform(0, 1.5)}
        for number in range(NUM_KILLS - len(PLANNED))
    ]
    faults, hit, last_step, jobs = [*PLANNED, *anywhere], collections.Counter(), 0, []
    draw.shuffle(faults)
    for number, fault in enumerate(faults):
        job = start_job([fault], *overrides, launcher="torchrun" if number < NUM_KILLS - 3 else "accelerate")
        jobs.append(job)
        where, ended_after = wait_for_kill(job, fault["rank"])
        hit[f"rank {fault['rank']}: {where}"] += 1
        assert ended_after < 60, (fault, job.log())
        sound = [path for path in checkpoint.published(run_dir) if checkpoint.find_fault(path) is None]
        assert sound == checkpoint.published(run_dir), "a kill damages nothing that is published"
        step = checkpoint.step_of(sound[-1]) if sound else 0
        assert step >= last_step, fault
        last_step = step
    assert 0 < last_step < STEPS
    jobs.append(start_job([], *overrides))
    assert jobs[-1].wait() == 0, jobs[-1].log()
    with capsys.disabled():
        print("\nkilled at", *(f"  {count} x {where}" for where, count in sorted(hit.items())), sep="\n")
        print(f"last checkpoint before the final start: step {last_step} of {STEPS}")

    saving = sum(count for where, count in hit.items() if "saving" in where)
    assert saving >= 5 and sum(hit.values()) == NUM_KILLS
    assert_same(run_dir.with_name("whole"), run_dir)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-00000236", "step-00000240"]
    assert points(run_dir) == points(run_dir.with_name("whole"))
    plan = Plan(open_shard_set(str(tiny_shards)).index.block_first_sample, 0, BATCH)
    for rank in (0, 1):
        seen = [tuple(line[1:]) for job in jobs for line in job.notes(rank) if line[0] == "batch"]
        rows = rank_rows(BATCH, 1, rank, 2)
        assert all(ids == plan.batch_sample_ids(batch)[rows].tolist() for batch, ids in seen)
        assert {batch for batch, _ in seen} >= set(range(STEPS))


def wait_for_kill(job, rank: int) -> tuple[str, float]:
    """Returns where the rank was when it died, and how many seconds later the whole job had ended."""
    while not (kills := [line for line in job.notes(rank) if line[0] == "kill"]):
        assert job.launcher.poll() is None, job.log()
        job.processes = [job.processes[0], *job.processes[0].children(recursive=True)]
        time.sleep(0.02)
    died = time.monotonic()
    assert job.wait(60) != 0
    saving = {"write", "write optimizer", "sync", "publish", "prune", "remove"}.intersection(kills[0][2])
    under_way = "saving, " + ", ".join(sorted(saving)) if saving else ", ".join(kills[0][2]) or "between calls"
    return under_way, time.monotonic() - died


def assert_same(one, other) -> None:
    """Every parameter, buffer, average and Adam moment, bit for bit."""
    first, second = (checkpoint.load(checkpoint.published(path)[-1]) for path in (one, other))
    assert first.state.step == second.state.step == STEPS
    assert checkpoint.digests(first.networks) == checkpoint.digests(second.networks)
    for name, optimizer in first.optimizers.items():
        assert optimizer["state"]
        for index, moments in optimizer["state"].items():
            for key, value in moments.items():
                assert torch.equal(value, second.optimizers[name]["state"][index][key]), (name, index, key)


def points(run_dir) -> dict[tuple[str, int], float]:
    """Every point of the journal that training decides, which must be there once; those of time and speed apart."""
    lines = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    found = [((name, line["step"]), value) for line in lines for name, value in line.get("metrics", {}).items()]
    assert len(found) == len({key for key, _ in found}), "a point is doubled"
    assert {step for (name, step), _ in found if name == "train/d_loss"} == set(range(1, STEPS + 1))
    return {key: value for key, value in found if key[0].split("/")[0] in ("train", "progress", "attention")}
