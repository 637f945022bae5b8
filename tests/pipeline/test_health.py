import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import checkpoint
from pipeline.health import FiniteWatch, non_finite_buffers

REPO = Path(__file__).resolve().parents[2]


def watched(network: nn.Module) -> FiniteWatch:
    return FiniteWatch("generator", [name for name, _ in network.named_parameters()], torch.device("cpu"))


def gradients_of(network: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in network.parameters()]


def with_gradients(network: nn.Module) -> None:
    network(torch.randn(4, 3)).sum().backward()


def test_finite_gradients_pass():
    network = nn.Linear(3, 2)
    with_gradients(network)
    watch = watched(network)
    assert float(watch.found_non_finite(1, torch.tensor(0.5), 0, gradients_of(network))) == 0
    assert watch.report() is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_bad_update_is_named_and_later_ones_do_not_hide_it(value):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with_gradients(network)
    watch = watched(network)
    watch.found_non_finite(6, torch.tensor(0.0), 0, gradients_of(network))
    network[1].bias.grad[0] = value
    assert float(watch.found_non_finite(7, torch.tensor(0.0), 0, gradients_of(network))) == 1
    network[0].weight.grad.fill_(value)
    assert float(watch.found_non_finite(8, torch.tensor(0.0), 0, gradients_of(network))) == 1
    assert str(watch.report()) == "generator went non-finite at step 7: gradient of 1.bias"
    watch.reset()
    assert watch.report() is None


def test_a_non_finite_loss_counts_although_relu_hides_it_from_the_gradients():
    network = nn.Linear(3, 2)
    with_gradients(network)
    watch = watched(network)
    assert float(watch.found_non_finite(2, torch.tensor(float("nan")), 0, gradients_of(network))) == 1
    assert str(watch.report()) == "generator went non-finite at step 2: loss"


def test_a_rank_that_holds_some_gradients_names_the_right_ones():
    """As under ZeRO: consecutive parameters, counted from the first that this rank holds."""
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    watch = watched(network)
    watch.found_non_finite(3, torch.tensor(0.0), 2, [torch.ones(4), torch.tensor([float("nan")])])
    assert str(watch.report()) == "generator went non-finite at step 3: gradient of 1.bias"
    watch.reset()
    watch.found_non_finite(4, torch.tensor(float("inf")), 0, [])
    assert str(watch.report()) == "generator went non-finite at step 4: loss"


def test_the_gradient_norm_is_that_of_the_finite_ones_whoever_holds_them():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with_gradients(network)
    expected = float(torch.cat([gradient.flatten() for gradient in gradients_of(network)]).norm())
    for num_copies in (1, 2):
        watch = FiniteWatch(
            "generator", [name for name, _ in network.named_parameters()], torch.device("cpu"), num_copies
        )
        watch.found_non_finite(1, torch.tensor(0.0), 0, gradients_of(network))
        assert float(watch.gradient_norm) == pytest.approx(expected / num_copies**0.5)  # one of them reports
    finite = torch.cat([gradient.flatten() for gradient in gradients_of(network)[:3]])
    network[1].bias.grad[0] = float("inf")
    watch = watched(network)
    watch.found_non_finite(2, torch.tensor(0.0), 0, gradients_of(network))
    assert float(watch.gradient_norm) == pytest.approx(float(finite.norm()))


def test_non_finite_buffers_are_named():
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert non_finite_buffers(network) == [] == non_finite_buffers(nn.Linear(1, 1))
    network[2].running_var[1] = float("inf")
    assert non_finite_buffers(network) == ["2.running_var"]


def test_fused_adam_skips_the_flagged_update():
    """The flag goes to the kernel, so the host never waits: parameters, moments and step count stay."""
    parameter = nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([parameter], lr=0.1, fused=True)
    parameter.grad = torch.ones(3)
    adam.found_inf = torch.tensor(0.0)
    adam.step()
    before = (
        parameter.detach().clone(),
        adam.state[parameter]["exp_avg_sq"].clone(),
        float(adam.state[parameter]["step"]),
    )
    parameter.grad = torch.full((3,), float("nan"))
    adam.found_inf = torch.tensor(1.0)
    adam.step()
    assert torch.equal(parameter.detach(), before[0])
    assert torch.equal(adam.state[parameter]["exp_avg_sq"], before[1])
    assert float(adam.state[parameter]["step"]) == before[2]


def test_a_nan_on_one_rank_alone_is_rolled_back_on_all(tmp_path, tiny_shards):
    config = tmp_path / "config.yaml"
    config.write_text(f"""
run: {{name: struck, dir: {tmp_path}, device: cpu}}
data: {{shards: {tiny_shards}, num_workers: 0}}
model: {{resolution: 16, num_classes: 3, attention_resolution: 8, g_channels: 2, d_channels: 4, z_dim: 8}}
train: {{steps: 6, global_batch_size: 12, log_every_steps: 1, checkpoint_every_steps: 2, sample_every_steps: 6}}
tracking: {{enabled: false}}
""")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    worker = str(REPO / "tests/pipeline/health_worker.py")
    result = subprocess.run([*launch, worker, config], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if "rolled back" in line]
    assert "generator went non-finite at step 3: loss; rolled back" in said[0] and "step-00000002 (1 of 3)" in said[0]
    assert "at step 5: buffer final_norm.running_var; rolled" in said[1] and "step-00000004 (2 of 3)" in said[1]
    path, problems = checkpoint.newest(tmp_path / "struck")
    assert path.name == "step-00000006" and problems == []
    assert checkpoint.load(path).state.redrawn == ((3, 3), (5, 5))
