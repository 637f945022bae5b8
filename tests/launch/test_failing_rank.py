"""One rank of two stands still, raises or dies: the job ends within a minute and the log says which rank, and where."""

import re
import socket
import time

import pytest


def wait_until_over(job) -> float:
    """Returns the seconds from the first step's line in the log to the end of every process."""
    job.wait_for("step 1/")
    began = time.monotonic()
    assert job.wait(90) != 0, job.log()
    return time.monotonic() - began


def test_a_rank_that_stands_still_ends_the_job_with_every_ranks_stack(start_job):
    fault = {"rank": 1, "at": "step", "call": 3, "do": "sleep", "seconds": 600}
    job = start_job([fault], "health.stall_seconds=20")
    assert wait_until_over(job) < 20 + 60
    stacks = dict(
        re.findall(r"\[rank (\d)\] error: no step for 20 s \(health\.stall_seconds\)(.*?)Look for", job.log(), re.S)
    )
    assert set(stacks) == {"0", "1"}, job.log()
    assert "in strike" in stacks["1"], "where the fault worker sleeps"
    assert "in strike" not in stacks["0"] and "in _one_step" in stacks["0"]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_raises_ends_the_others_and_is_readable(start_job, rank):
    job = start_job([{"rank": rank, "at": "step", "call": 3, "do": "raise"}])
    assert wait_until_over(job) < 60
    assert re.search(rf"\[rank{rank}\]:.*RuntimeError: a planted fault", job.log()), job.log()


@pytest.mark.slow
def test_an_error_that_one_rank_alone_can_explain_is_readable(start_job):
    """It waits for rank 0 to speak for all, which does not; then its own message comes, with its rank."""
    job = start_job([{"rank": 1, "at": "step", "call": 3, "do": "raise user error"}])
    assert wait_until_over(job) < 60
    assert "[rank 1] error: a planted fault" in job.log()


@pytest.mark.slow
def test_a_tracking_server_that_never_answers_does_not_keep_a_failed_job_alive(start_job):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        fault = {"rank": 0, "at": "step", "call": 3, "do": "raise"}
        job = start_job([fault], "tracking.enabled=true", f"tracking.uri={uri}")
        assert wait_until_over(job) < 60
    assert re.search(r"\[rank0\]:.*RuntimeError: a planted fault", job.log()), job.log()
    assert re.search(r"tracking: \d+ points and \d+ files are not sent yet", job.log())
