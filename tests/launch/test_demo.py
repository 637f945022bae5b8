"""What the demo's recipe learns, trained further than the demo does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import digits

REPO = Path(__file__).resolve().parents[2]
STEPS = 1800  # the demo stops at 1,600


def test_digits_are_written_so_that_they_read_back_as_they_were(tmp_path):
    import numpy as np
    from PIL import Image

    assert digits.write_folders(tmp_path, 16) == 1797
    pixels, labels = digits.real_digits()
    for number in (0, 500, 1796):
        with Image.open(tmp_path / str(labels[number]) / f"{number:04d}.png") as image:
            image = np.asarray(image.convert("RGB")).transpose(2, 0, 1)[None]
        assert np.abs(digits.to_pixels(image)[0] - pixels[number]).max() < 0.05, "rounding to 255 steps of grey"


def test_the_judge_knows_real_digits_from_one_image_per_class():
    import numpy as np

    pixels, labels = digits.real_digits()
    classifier = digits.fit_classifier(pixels[:1300], labels[:1300])
    assert digits.recognised_share(classifier, pixels[1300:], labels[1300:]) > 0.95
    assert digits.recognised_share(classifier, pixels[1300:], (labels[1300:] + 1) % 10) < 0.05
    varieties = digits.variety_ratios(pixels[900:], labels[900:], pixels[:900], labels[:900])
    assert varieties.min() > 0.85
    collapsed = np.stack([pixels[labels == label][0] for label in labels])
    assert digits.variety_ratios(collapsed, labels, pixels, labels).max() < 1e-6
    overall, _ = digits.nearest_neighbour_shares(collapsed, labels, pixels)
    assert overall == pytest.approx(np.bincount(labels).max() / len(labels))


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_the_recipe_learns_digits_and_keeps_their_variety(tmp_path):
    digits.write_folders(tmp_path / "images", 16)
    programs = Path(sys.executable).parent
    build = [sys.executable, "launch/shards.py", "build", "--source", str(tmp_path / "images")]
    train = [str(programs / "accelerate"), "launch", "--config_file", "configs/accelerate/cpu_two_processes.yaml",
             "launch/train.py", "configs/demo.yaml", f"run.dir={tmp_path}", f"data.shards={tmp_path / 'shards'}",
             f"train.steps={STEPS}", "tracking.enabled=false", *digits.fastest_precision()]  # fmt: skip
    for command in ([*build, "--destination", str(tmp_path / "shards"), "--size", "16"], train):
        result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=dict(os.environ))
        assert result.returncode == 0, result.stderr[-3000:]
    samples, asked = digits.sample_run(tmp_path / "demo", 500)
    pixels, (real_pixels, real_labels) = digits.to_pixels(samples), digits.real_digits()
    classifier = digits.fit_classifier(real_pixels, real_labels)
    assert digits.recognised_share(classifier, pixels, asked) >= 0.9
    assert digits.variety_ratios(pixels, asked, real_pixels, real_labels).min() >= 0.5
    overall, _ = digits.nearest_neighbour_shares(pixels, asked, real_pixels)
    assert overall <= 0.2, "no real image is the nearest of more than a fifth of the samples"
    assert_attention_is_the_softmax_of_the_weights(tmp_path / "demo")


def assert_attention_is_the_softmax_of_the_weights(run_dir: Path) -> None:
    """Of the trained generator: each map sums to 1 over the keys and is the softmax computed by hand, in float64."""
    import torch

    from pipeline.attention import attention_maps
    from pipeline.opened import open_generator

    generator = open_generator(run_dir).generator.double()
    z, labels, layer, seen = torch.randn(10, 32).double(), torch.arange(10), generator.attention, []
    handle = layer.register_forward_hook(lambda layer, arguments, output: seen.append(arguments[0]))
    _, maps = attention_maps(generator, z, labels)
    handle.remove()
    theta, phi = (
        conv.weight[:, :, 0, 0] / (conv.u @ conv.weight.flatten(1) @ conv.v) for conv in (layer.query, layer.key)
    )
    keys = torch.einsum("oc,nchw->nohw", phi, seen[0])
    keys = keys.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    products = torch.einsum("oc,nchw,noij->nhwij", theta, seen[0], keys)
    by_hand = products.exp() / products.exp().sum((3, 4), keepdim=True)
    torch.testing.assert_close(maps, by_hand)
    torch.testing.assert_close(maps.sum((3, 4)), torch.ones_like(maps[..., 0, 0]))
    assert layer.gain.abs() > 0.01 and maps.max() > 2 / 16, "training has made use of attention"
