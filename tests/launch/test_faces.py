"""The whole chain without labels, as with CelebA: a flat folder, shards, training, evaluation, pictures, export."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import sagan
from launch import evaluate, export, sample, shards, train
from pipeline.config import load_config
from pipeline.manifest import open_shard_set
from pipeline.networks import count_parameters

NUM_FACES = 40


def photographs(tar_path, count: int):
    """Some of the real photographs: a tar of one tar per class."""
    with tarfile.open(tar_path) as outer:
        for member in outer:
            with tarfile.open(fileobj=io.BytesIO(outer.extractfile(member).read())) as inner:
                yield Image.open(io.BytesIO(inner.extractfile(inner.getmembers()[0]).read())).convert("RGB")
            count -= 1
            if not count:
                return


@pytest.fixture(scope="module")
def folder(shared_data, tmp_path_factory):
    """Real photographs in the layout of img_align_celeba: 178 x 218 pixels, JPEG, one folder, numbered."""
    folder = tmp_path_factory.mktemp("faces") / "img_align_celeba"
    folder.mkdir()
    for number, image in enumerate(photographs(shared_data / "ILSVRC2012_img_train.tar", NUM_FACES), start=1):
        image.resize((178, 218)).save(folder / f"{number:06d}.jpg", quality=95)
    return folder


def build(folder, destination, *options: str) -> int:
    return shards.main(["build", "--source", str(folder), "--destination", str(destination), "--size", "64",
                        "--workers", "1", *options])  # fmt: skip


@pytest.mark.slow
def test_celeba64_trains_is_evaluated_sampled_and_exported(folder, tmp_path, monkeypatch, repo_root, capsys):
    assert build(folder, tmp_path / "set", "--crop", "178") == 0
    assert "an unconditional set" in capsys.readouterr().out
    overrides = [f"run.dir={tmp_path}", f"data.shards={tmp_path / 'set'}", "data.num_workers=0", "run.device=cpu",
                 "model.g_channels=8", "model.d_channels=8", "train.steps=2", "train.global_batch_size=4",
                 "tracking.enabled=false"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", str(repo_root / "configs/celeba64.yaml"), *overrides])
    assert train.main() == 0
    run_dir = tmp_path / "celeba64"
    smoke = ["evaluation.features=random", "evaluation.num_images=20", "evaluation.kid_subset_size=10"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run_dir), *smoke])
    assert evaluate.main() == 0
    [result] = run_dir.glob("evaluations/step-*/*.json")
    found = json.loads(result.read_text())
    assert found["protocol"]["labels"] == "none" and found["protocol"]["reference"]["num_images"] == NUM_FACES
    assert found["protocol"]["reference"]["crop"] == "centre square of 178 pixels"
    assert np.isfinite(list(found["scores"].values())).all()

    assert sample.main([str(run_dir), "--columns", "2", "--features", "random", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "classes: left out" in said and "animation: left out" in said and said.count(".png") >= 5
    assert export.main([str(run_dir), str(tmp_path / "export")]) == 0
    generator = sagan.load(tmp_path / "export")
    assert generator(torch.randn(2, generator.z_dim)).shape == (2, 3, 64, 64)
    assert "unconditional" in (tmp_path / "export" / "README.md").read_text()


@pytest.mark.parametrize("crop", [108, 178])
def test_the_middle_of_each_face_is_cut_out_and_resized(folder, tmp_path, crop):
    assert build(folder, tmp_path / "set", "--crop", str(crop), "--encoding", "raw") == 0
    manifest = open_shard_set(str(tmp_path / "set")).manifest
    assert manifest.crop == f"centre square of {crop} pixels" and manifest.num_enlarged == 0
    found = {}
    with tarfile.open(next((tmp_path / "set").glob("*.tar"))) as tar:
        for member in tar:
            found[tar.extractfile(member).read()] = member.name
    for path in sorted(folder.iterdir())[:5]:
        with Image.open(path) as image:
            left, top = (178 - crop) // 2, (218 - crop) // 2
            square = image.crop((left, top, left + crop, top + crop)).resize((64, 64), Image.Resampling.LANCZOS)
        assert np.asarray(square).tobytes() in found


def test_an_image_that_is_too_small_for_the_crop_fails_the_build(folder, tmp_path, capsys):
    assert build(folder, tmp_path / "set", "--crop", "200") == 1
    assert "178 x 218 pixels, too small for --crop 200" in capsys.readouterr().err


def test_parameters_of_the_recipe_by_hand(repo_root):
    linear, norms = 128 * 8192 + 8192, 2 * (512 + 256 + 128 + 64)
    convs_g = 25 * (512 * 256 + 256 * 128 + 128 * 64 + 64 * 3) + (256 + 128 + 64 + 3)
    convs_d = 25 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512) + (64 + 128 + 256 + 512)
    attention = 2 * 64 * 8 + 2 * 64 * 32 + 1
    expected = linear + norms + convs_g + attention, convs_d + attention + 8192 + 1
    assert expected == (5_369_860, 4_319_874)
    assert count_parameters(load_config(repo_root / "configs/celeba64.yaml")) == expected
