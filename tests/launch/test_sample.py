"""Figures of a generator: what is shown is what was asked for, and the page needs no other file."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launch import sample
from pipeline import opened, pictures
from pipeline.manifest import open_shard_set


@pytest.fixture(scope="module")
def run_dir(untrained_run, tmp_path_factory) -> Path:
    """A run with three sample grids beside its checkpoint."""
    copy = Path(shutil.copytree(untrained_run, tmp_path_factory.mktemp("run") / "tiny"))
    (copy / "samples").mkdir()
    for step in (1, 2, 3):
        Image.new("RGB", (64, 64), (80 * step, 0, 0)).save(copy / f"samples/step-{step:08d}.png")
    return copy


@pytest.fixture(scope="module")
def found(run_dir) -> opened.Opened:
    return opened.open_generator(run_dir)


def test_all_figures_of_a_run_and_a_page_that_needs_no_other_file(run_dir, tmp_path, capsys):
    assert sample.main([str(run_dir), "--out", str(tmp_path), "--columns", "3", "--features", "random"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    figures = {"grid.png", "interpolation.png", "classes.png", "truncation.png", "attention.png", "neighbours.png",
               "animation.webp"}  # fmt: skip
    assert names == figures | {"index.html"}
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img ") == len(figures) == page.count(";base64,")
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page) and "launch/sample.py" in page
    with Image.open(tmp_path / "animation.webp") as animation:
        assert animation.n_frames == 3
        animation.seek(2)
        red, green, _ = np.asarray(animation.convert("RGB"))[32, 32]
        assert red > 230 and green < 20
    with Image.open(tmp_path / "attention.png") as picture:
        assert picture.height == 2 + 3 * 2 * (96 + 2), "generator and discriminator for each class"


def test_a_class_may_be_given_by_number_or_name(found):
    assert pictures.choose_classes(found, ["triangle", "0"]) == (2, 0)
    assert pictures.choose_classes(found, []) == (0, 1, 2)
    with pytest.raises(pictures.PictureError, match=r"--classes hexagon: .* 0 to 2 \(circle, square, triangle"):
        pictures.choose_classes(found, ["hexagon"])
    with pytest.raises(pictures.PictureError, match="--classes 3"):
        pictures.choose_classes(found, ["3"])


def test_what_cannot_be_shown_is_said_and_left_out_unless_asked_for(run_dir, tmp_path, capsys):
    checkpoint = next((run_dir / "checkpoints").iterdir())
    lonely = Path(shutil.copytree(checkpoint, tmp_path / "run" / "checkpoints" / checkpoint.name))
    arguments = [str(lonely), "--out", str(tmp_path / "out"), "--columns", "2", "--features", "random"]
    assert sample.main(arguments) == 0
    said = capsys.readouterr().out
    assert "animation: left out" in said and (tmp_path / "out" / "grid.png").exists()
    assert sample.main([str(lonely), "animation", "--out", str(tmp_path / "out")]) == 1
    assert "needs two sample grids" in capsys.readouterr().err
    assert sample.main([str(lonely), "grids"]) == 2
    assert "there are grid, interpolation" in capsys.readouterr().err


def test_shards_that_are_gone_leave_numbers_instead_of_names(run_dir, tmp_path):
    path = next((run_dir / "checkpoints").iterdir())
    copy = Path(shutil.copytree(path, tmp_path / path.name))
    state = (copy / "trainer.json").read_text()
    shards = re.search(r'"shards": "(.*?)"', state)[1]
    (copy / "trainer.json").write_text(state.replace(shards, str(tmp_path / "gone")))
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text())
    with pytest.raises(opened.OpenError, match="is damaged"):
        opened.open_generator(copy)  # a hash tells that a file was changed
    import hashlib
    import json

    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["sha256"]["trainer.json"] = hashlib.sha256((copy / "trainer.json").read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    found = opened.open_generator(copy)
    assert found.class_names == () and found.title(1) == "class 1" and "numbers only" in found.remarks[0]


def test_the_way_between_two_draws_is_the_arc(found):
    torch.manual_seed(0)
    start, stop = torch.randn(2, 64, dtype=torch.float64)
    points = pictures.slerp(start, stop, torch.linspace(0, 1, 5, dtype=torch.float64))
    torch.testing.assert_close(points[[0, -1]], torch.stack([start, stop]))
    unit = pictures.slerp(start / start.norm(), stop / stop.norm(), torch.linspace(0, 1, 5, dtype=torch.float64))
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(5, dtype=torch.float64))
    angles = torch.arccos((unit[:-1] * unit[1:]).sum(1))
    torch.testing.assert_close(angles, angles[:1].expand(4))


def test_the_way_between_classes_begins_and_ends_at_them(found):
    z, generator = torch.randn(3, 8), found.generator
    labels = torch.zeros(3, dtype=torch.int64)
    with pictures.mixed_classes(generator, 0, 2, torch.tensor([0.0, 0.5, 1.0])):
        mixed = generator(z, labels)
    ends = generator(z, torch.tensor([0, 0, 2]))
    torch.testing.assert_close(mixed[[0, 2]], ends[[0, 2]])
    torch.testing.assert_close(generator(z, labels)[0], ends[0], msg="the hooks are gone")


def test_nearest_images_are_those_of_a_full_search():
    rng = np.random.default_rng(0)
    rows, queries = rng.normal(size=(300, 5)), rng.normal(size=(4, 5))
    expected = np.argsort(((queries[:, None] - rows) ** 2).sum(2), axis=1)[:, :5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_FEATURES_PER_PASS", 64)
        assert np.array_equal(pictures.nearest(queries, rows, 5), expected)


def test_a_training_image_is_its_own_nearest_neighbour(found, monkeypatch):
    shard_set = open_shard_set(found.config.data.shards)
    numbers = [5, 60, 33]
    real = pictures._read(shard_set, numbers, found.config)
    monkeypatch.setattr(pictures, "_images", lambda *arguments: real)
    shown = []
    monkeypatch.setattr(pictures, "_read", lambda shards, near, config: shown.extend(near) or real.repeat(5, 1, 1, 1))
    config = replace(found.config, run=replace(found.config.run, device="cuda"))  # as slurm's script has it
    pictures.neighbours(replace(found, config=config), pictures.Wish((0, 1, 2)), "random")
    assert shown[::5] == numbers


def test_more_points_than_there_are_colours_are_one_clear_line(run_dir, tmp_path, capsys):
    points = ["0.1,0.1"] * 6
    assert sample.main([str(run_dir), "attention", "--points", *points, "--out", str(tmp_path)]) == 1
    assert "error: --points takes 5 at most" in capsys.readouterr().err


def test_a_checkpoint_that_was_copied_elsewhere_is_drawn_where_one_is(run_dir, tmp_path, monkeypatch, capsys):
    [path] = (run_dir / "checkpoints").iterdir()
    copy = shutil.copytree(path, tmp_path / "far" / path.name)
    monkeypatch.chdir(tmp_path)
    assert sample.main([str(copy), "grid", "--columns", "2"]) == 0
    assert (tmp_path / "pictures" / "step-00000003" / "grid.png").exists()


def test_help_teaches(repo_root):
    for command in ("launch/sample.py", "launch/export.py"):
        done = subprocess.run([sys.executable, command, "--help"], cwd=repo_root, capture_output=True, text=True)
        assert done.returncode == 0 and f"python {command} runs/imagenet128" in done.stdout
