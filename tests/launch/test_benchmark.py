"""The command that measures: its figures against hand counts, and against the bars as ratios."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def benchmark(*arguments):
    command = [sys.executable, "launch/benchmark.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=280)


def test_both_readers_are_measured_and_every_number_is_written(tiny_shards, tmp_path):
    result = benchmark("data", tiny_shards, "--batch-size", 30, "--workers", 1, "--seconds", 0.3, "--repeats", 2,
                       "--json", tmp_path / "data.json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "data.json").read_text())
    assert len(found["loader"]) == len(found["webdataset"]) == len(found["ratios"]) == 2
    for ours, theirs, ratio in zip(found["loader"], found["webdataset"], found["ratios"], strict=True):
        assert ratio == pytest.approx(ours["images_per_cpu_second"] / theirs["images_per_cpu_second"])
        assert 1 < ours["worker_megabytes"] < 300
    assert 0 <= found["wait_percent"] <= 100
    assert found["plan_seconds"] > 0 and 0 < found["imagenet_plan_seconds"] < 0.2
    for words in ("webp, 16 px, batches of 30, 1 worker(s), 2 x 0.3 s", "this loader", "webdataset", "data wait"):
        assert words in result.stdout


def test_shards_that_lie_elsewhere_than_their_index_are_measured_by_both(tiny_shards, tmp_path):
    (tmp_path / "tars").mkdir()
    for path in tiny_shards.glob("*.tar"):
        shutil.copy(path, tmp_path / "tars")
    index = [sys.executable, "launch/shards.py", "index", tmp_path / "tars", "--output", tmp_path / "set"]
    subprocess.run([*map(str, index)], cwd=REPO, check=True, capture_output=True, timeout=120)
    result = benchmark("data", tmp_path / "set", "--size", 16, "--batch-size", 30, "--workers", 1, "--seconds", 0.3,
                       "--repeats", 1)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "original, 16 px" in result.stdout and "ratio  " in result.stdout


@pytest.mark.s3
def test_a_remote_set_is_measured_by_both(set_of_40_blocks, s3_bucket, tmp_path):
    from pipeline.upload import upload

    location = s3_bucket()
    upload(Path(set_of_40_blocks.location), location)
    result = benchmark("data", location, "--batch-size", 30, "--workers", 1, "--seconds", 0.3, "--repeats", 1,
                       "--cache-dir", tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "ratio  " in result.stdout and "raw, 16 px" in result.stdout


def test_a_missing_set_is_one_clear_line(tmp_path):
    result = benchmark("data", tmp_path)
    assert result.returncode == 1 and "holds no manifest.json" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("encoding", "bar"), [("webp", 1.0), ("raw", 1.3)])
def test_images_cost_less_cpu_than_through_stock_webdataset(shared_data, tmp_path, encoding, bar):
    """The bars that no other work on the machine can move: ratios in one run, and memory."""
    build = ["launch/shards.py", "build", "--source", shared_data / "ILSVRC2012_img_train.tar", "--size", "128",
             "--destination", tmp_path / "set", "--encoding", encoding, "--samples-per-shard", "125"]  # fmt: skip
    subprocess.run([sys.executable, *map(str, build)], cwd=REPO, check=True, capture_output=True, timeout=280)
    result = benchmark("data", tmp_path / "set", "--seconds", 3, "--repeats", 3, "--json", tmp_path / "data.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "data.json").read_text())
    assert sorted(found["ratios"])[1] >= bar, result.stdout
    assert max(speed["worker_megabytes"] for speed in found["loader"]) < 300
    assert max(found["plan_seconds"], found["imagenet_plan_seconds"]) < 0.2
