"""What `Gan` adds to the steps, which tests/pipeline/test_steps.py and test_updates.py hold to account.

Those marked gpu do on a CUDA device what others show on the CPU; SAGAN_TEST_DEVICE=cpu tries the tests themselves.
"""

import os

import pytest
import torch

from pipeline.checkpoint import digests
from pipeline.config import config_from_dict
from pipeline.gan import Gan
from pipeline.train_benchmark import synthetic
from pipeline.world import World, configure_determinism

DEVICE = os.environ.get("SAGAN_TEST_DEVICE", "cuda")


def start(device: str, **train):
    """A small pair whose attention shows, and endless batches of noise."""
    config = config_from_dict(
        {
            "run": {"name": "small", "device": device},
            "data": {"shards": "none"},
            "model": {"resolution": 16, "num_classes": 3, "attention_resolution": 8, "g_channels": 8,
                      "d_channels": 8, "z_dim": 6},
            "train": {"steps": 9, "global_batch_size": 4} | train,
            "ema": {"decay": 0.9, "start_step": 2},
        },
        "test",
    )  # fmt: skip
    world = World(device)
    gan = Gan(config, world)
    for player in gan.players:
        player.module.attention.gain.data.fill_(0.5)
    return gan, synthetic(config, world)


def update(gan, batches, steps) -> list[dict[str, torch.Tensor]]:
    return [gan.update(step, [next(batches)], 0) for step in steps]


@pytest.mark.slow  # the compiler takes a minute or two
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at all there is
def test_compiled_updates_are_the_same():
    """Two whole updates in float64, with attention, labels and the running statistics."""
    found = []
    for compiled in (False, True):
        gan, batches = start("cpu", precision="float64", compile=compiled)
        losses = update(gan, batches, (1, 2))
        found.append((losses, gan.state_dicts()))
    assert found[0][1]["generator"].keys() == found[1][1]["generator"].keys(), "checkpoints have one form"
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)


@pytest.fixture
def device() -> str:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return DEVICE


@pytest.mark.gpu
def test_updates_on_the_gpu_are_those_on_the_cpu(device):
    found = []
    for where in ("cpu", device):
        gan, batches = start(where, precision="float64")
        losses = update(gan, batches, (1, 2, 3))
        found.append((losses, gan.state_dicts()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9, check_device=False)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_host_never_waits_for_the_gpu_within_an_update(device, precision):
    gan, batches = start(device, precision=precision)
    update(gan, batches, (1, 2))  # chooses algorithms, fills caches
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        losses = update(gan, batches, (3, 4))
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(loss).all() for step in losses for loss in step.values())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_nan_in_one_gradient_changes_no_weight_moment_or_average(device, precision):
    gan, batches = start(device, precision=precision)
    update(gan, batches, (1, 2, 3))
    weights = [parameter for player in gan.players for parameter in player.module.parameters()]
    moments = [value for player in gan.players for state in player.optimizer.state.values() for value in state.values()]
    watched = [*weights, *moments, *gan.ema.module.parameters()]
    before = [tensor.detach().clone() for tensor in watched]
    handles = [
        player.module.attention.gain.register_hook(lambda gradient: gradient * torch.nan) for player in gan.players
    ]
    update(gan, batches, (4,))
    for handle in handles:
        handle.remove()
    assert all(map(torch.equal, watched, before))
    update(gan, batches, (5,))
    assert not all(map(torch.equal, watched, before))


@pytest.mark.gpu
def test_deterministic_updates_are_the_same_bit_for_bit(device):
    configure_determinism(True, torch.device(device))
    found = []
    try:
        for _ in range(2):
            gan, batches = start(device, precision="bf16")
            update(gan, batches, (1, 2, 3))
            found.append(digests(gan.state_dicts()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert found[0] == found[1]
