"""Estimates against hand counts and against what autograd really keeps."""

import pytest
import torch

from pipeline.config import load_config
from pipeline.estimate import _Kept, describe_needs, estimate
from pipeline.networks import build_discriminator, build_generator

G, D = 42_017_412, 39_448_258  # golden parameter counts of imagenet128.yaml


def test_imagenet128_on_eight_processes_by_hand(repo_root):
    """Published counts of the model; 4 bytes each, Adam twice that, one D step."""
    needs = estimate(load_config(repo_root / "configs/imagenet128.yaml", []), 8)
    assert needs.gradient_bytes == 4 * (G + D) and needs.adam_bytes == 8 * (G + D)
    with torch.device("meta"):
        config = load_config(repo_root / "configs/imagenet128.yaml", [])
        buffers = [
            sum(b.numel() * b.element_size() for b in build(config).buffers())
            for build in (build_generator, build_discriminator)
        ]
    assert needs.weight_bytes == 4 * (2 * G + D) + 2 * buffers[0] + buffers[1]
    assert needs.checkpoint_bytes == needs.weight_bytes + needs.adam_bytes
    # Eleven norms of the generator: 1024 1024 1024 512 512 256 256 128 128 64 64 channels; 2 numbers each, 3 passes.
    statistics = 2 * 4 * 3 * (1024 * 3 + 512 * 2 + 256 * 2 + 128 * 2 + 64 * 2)
    assert needs.reduced_bytes == 4 * (G + D) + statistics
    assert 3e9 < needs.activation_bytes < 6e9


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_activations_are_what_autograd_keeps(tmp_path, precision, num_classes):
    (tmp_path / "c.yaml").write_text(f"""
run: {{name: x}}
data: {{shards: x}}
model: {{resolution: 32, num_classes: {num_classes}, attention_resolution: 16, g_channels: 8, d_channels: 8}}
train: {{steps: 1, global_batch_size: 24, accumulation_steps: 2, precision: {precision}}}
""")
    config = load_config(tmp_path / "c.yaml", [])
    generator, discriminator = build_generator(config).train(), build_discriminator(config).train()
    z, labels = torch.randn(4, 128), torch.zeros(4, dtype=torch.int64) if num_classes else None
    own = [dict(network.named_parameters()) | dict(network.named_buffers()) for network in (generator, discriminator)]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with _Kept(own[1]) as d_step:
            discriminator(torch.randn(8, 3, 32, 32), None if labels is None else torch.cat([labels, labels]))
        discriminator.requires_grad_(False)
        with _Kept(*own) as g_step:
            discriminator(generator(z, labels), labels)
    found = estimate(config, 3).activation_bytes
    assert found == pytest.approx(max(d_step.bytes, g_step.bytes), rel=0.03 if precision == "bf16" else 0)


def test_hours_come_from_the_journal_and_scale(tmp_path, repo_root):
    config = load_config(repo_root / "configs/cifar10.yaml", [f"run.dir={tmp_path}", "data.shards=x"])
    assert "hours are told once" in describe_needs(config, 4, 50_000)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "journal.jsonl").write_text(
        '{"tags": {"world_size": "2"}}\n{"step": 40000, "metrics": {"throughput/images_per_second": 1000.0}}\n'
    )
    hours = 60_000 * 64 * 5 / 2000 / 3600
    assert f"60,000 of 100,000 steps left, {hours:.1f} hours at 2,000 images/s (the run's last, scaled from 2)" in (
        describe_needs(config, 4, 50_000)
    )
