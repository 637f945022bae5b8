"""What `Gan` adds to the steps, which tests/pipeline/test_steps.py and test_updates.py hold to account."""

import pytest
import torch

from pipeline.config import config_from_dict
from pipeline.gan import Gan
from pipeline.train_benchmark import synthetic
from pipeline.world import World


@pytest.mark.slow  # the compiler takes a minute or two
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at all there is
def test_compiled_updates_are_the_same():
    """Two whole updates in float64, with attention, labels and the running statistics."""
    found = []
    for compiled in (False, True):
        config = config_from_dict(
            {
                "run": {"name": "compiled", "device": "cpu"},
                "data": {"shards": "none"},
                "model": {"resolution": 16, "num_classes": 3, "attention_resolution": 8, "g_channels": 8,
                          "d_channels": 8, "z_dim": 6},
                "train": {"steps": 2, "global_batch_size": 4, "precision": "float64", "compile": compiled},
            },
            "test",
        )  # fmt: skip
        world = World("cpu")
        gan, batches = Gan(config, world), synthetic(config, world)
        for player in gan.players:
            player.module.attention.gain.data.fill_(0.5)
        losses = [gan.update(step, [next(batches)], 0) for step in (1, 2)]
        found.append((losses, gan.state_dicts()))
    assert found[0][1]["generator"].keys() == found[1][1]["generator"].keys(), "checkpoints have one form"
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)
