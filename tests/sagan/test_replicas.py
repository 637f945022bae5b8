"""Batch norm over two processes against one process on the whole batch, in float64."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Results = list[dict[str, dict[str, dict[str, Tensor]]]]


def run_two(directory: Path, device: str) -> Results:
    worker = Path(__file__).with_name("replica_worker.py")
    outputs = [directory / f"rank{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, str(worker), str(rank), str(directory / "store"), str(output), device])
        for rank, output in enumerate(outputs)
    ]
    try:
        codes = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0]
    return [torch.load(output) for output in outputs]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_two(tmp_path_factory.mktemp("replicas"), "cpu")


def join_ranks(results: Results, case: str) -> dict[str, Tensor]:
    """Whole-batch values out of both ranks' parts; what must be equal on both ranks is checked to be so."""
    zero, one = (result["got"][case] for result in results)
    joined = {}
    for key in zero:
        if key.startswith("rows."):
            joined[key] = torch.cat([zero[key], one[key]])
        elif key.startswith("sum."):
            joined[key] = zero[key] + one[key]
        elif key.startswith("mean."):
            joined[key] = (zero[key] + one[key]) / 2
        else:
            assert torch.equal(zero[key], one[key]), f"{key} differs between ranks"
            joined[key] = zero[key]
    return joined


def check(results: Results, case: str) -> None:
    expected: dict[str, Any] = results[0]["expected"][case]
    joined = join_ranks(results, case)
    assert joined.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(joined[key], value, rtol=1e-10, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def test_layer_over_two_unequal_ranks_equals_the_whole_batch(two_processes: Results) -> None:
    check(two_processes, "layer")


def test_networks_over_two_ranks_equal_one_process(two_processes: Results) -> None:
    # Images, losses, gradients of every parameter, running statistics.
    check(two_processes, "networks")


def test_without_sync_the_statistics_are_those_of_each_rank(two_processes: Results) -> None:
    # The counter-check: the tests above would notice missing synchronisation.
    zero, one = (result["got"]["layer_alone"] for result in two_processes)
    whole = two_processes[0]["expected"]["layer"]
    assert (zero["running_mean"] - one["running_mean"]).abs().max() > 1e-2
    assert (zero["rows.y0"] - whole["rows.y0"][:3]).abs().max() > 1e-2


@pytest.mark.gpu
def test_fused_kernels_over_two_ranks_equal_the_whole_batch(tmp_path: Path) -> None:
    # Two processes on one device, hence gloo: nccl refuses that.
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    results = run_two(tmp_path, "cuda")
    check(results, "layer")
    check(results, "networks")
