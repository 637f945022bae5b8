import time
from types import SimpleNamespace

import pytest
import torch

from pipeline import generated
from pipeline.config import config_from_dict
from pipeline.features import Extractor
from pipeline.networks import build_generator
from pipeline.provenance import compute_exactly
from pipeline.scores import compare


@pytest.mark.gpu
def test_50_000_images_are_made_and_scored(on_ranks):
    """A generator of full size, Inception of random weights, the samples as their own reference; prints images/s."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    import torch_fidelity

    values = {
        "run": {"name": "x"},
        "data": {"shards": "none"},
        "model": {"resolution": 128, "num_classes": 1000},
        "train": {"steps": 1, "global_batch_size": 64},
    }
    config, device = config_from_dict(values, "test"), torch.device("cuda")
    compute_exactly(device)
    with pytest.MonkeyPatch.context() as patch:
        kind = torch_fidelity.FeatureExtractorInceptionV3
        patch.setattr(kind, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: None)
        network = kind("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path="none")
    extractor = Extractor("inception", "0" * 64, "unofficial", 2048, network.to(device))
    generator = build_generator(config).to(device).eval().requires_grad_(False)
    started = time.perf_counter()

    def work(world):
        world = SimpleNamespace(rank=0, size=1, is_main=True, device=device, gather=world.gather, mean=world.mean)
        return generated.make_samples(generator, config, extractor, world)

    [seen] = on_ranks(1, work)
    made_seconds = time.perf_counter() - started
    found = compare(seen, seen.statistics, config.evaluation, ("", ""))
    seconds = time.perf_counter() - started
    print(
        f"{50_000 / made_seconds:.0f} images/s made and seen, {50_000 / seconds:.0f} scored too, "
        f"on {torch.cuda.get_device_name()}"
    )
    assert found["fid"] == pytest.approx(0, abs=1e-2) and found["precision"] == found["recall"] == 1
    assert seen.statistics.n == len(seen.logits) == 50_000
