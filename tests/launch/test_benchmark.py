"""The command that measures: its figures against hand counts, and against the bars as ratios."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline import digits

REPO = Path(__file__).resolve().parents[2]


def benchmark(*arguments, timeout=280):
    command = [sys.executable, "launch/benchmark.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=timeout)


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


LIGHT = """
import importlib.metadata as metadata, re, sys
needed, waiting = {"sagan-at-scale"}, ["torch", "PyYAML", "pydantic"]
while waiting:
    name = waiting.pop().lower().replace("_", "-")
    if name not in needed:
        needed.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another system
        waiting += [re.match("[A-Za-z0-9._-]+", line)[0] for line in requirements if "extra ==" not in line]
for package, distributions in metadata.packages_distributions().items():
    if not {name.lower().replace("_", "-") for name in distributions} & needed:
        sys.modules[package] = None  # importing it fails
assert "accelerate" in sys.modules and "numpy" in sys.modules and "sagan" not in sys.modules
from launch.benchmark import main
sys.exit(main(sys.argv[1:]))
"""
TINY = """
run: {name: tiny, device: cpu}
data: {shards: none}
model: {resolution: 16, num_classes: 3, attention_resolution: 8, g_channels: 8, d_channels: 8, z_dim: 8}
train: {steps: 1, global_batch_size: 4}
"""


def test_training_is_measured_with_torch_yaml_and_pydantic_alone(tmp_path):
    """As on a machine that lends a GPU and has little else; the figures hang together."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "-c", LIGHT, "train", "tiny.yaml", "--baseline", "--updates", "2", "--repeats", "3",
               "--json", "found.json", "--trace", "trace.json", "train.num_d_steps=2"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    ours, baseline = found["settings"]
    assert [ours["name"], baseline["name"]] == ["as configured", "baseline"]
    assert [len(one["images_per_second"]) for one in (ours, baseline)] == [3, 3]
    pairs = [a / b for a, b in zip(ours["images_per_second"], baseline["images_per_second"], strict=True)]
    assert found["ratio"]["median"] == pytest.approx(sorted(pairs)[1])
    parts = ours["parts_seconds"]
    assert {part for part, seconds in parts.items() if not seconds} == {"all-reduce"}, parts
    assert parts["optimizer"] + parts["finite check"] < parts["discriminator step"] + parts["generator step"]
    outside = sum(parts[part] for part in ("optimizer", "spectral norm", "finite check", "ema")) + ours["host_seconds"]
    inside = parts["discriminator step"] + parts["generator step"]
    assert ours["outside_share"] == pytest.approx(outside / (inside + parts["ema"] + ours["host_seconds"]), rel=0.1)
    speed = found["update_flops"] * sorted(ours["images_per_second"])[1] / (4 * 2)
    assert ours["flops_per_second"] == pytest.approx(speed)
    assert ours["utilisation"] == pytest.approx(speed / found["matrix_product_flops_per_second"])
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"discriminator step", "generator step", "ema"} <= names
    for words in ("images/s, median", "spectral norm, s", "ratio  "):
        assert words in result.stdout


def test_a_setting_is_compared_with_another(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    result = benchmark("train", tmp_path / "tiny.yaml", "--compare", "train.precision=bf16", "--updates", 1,
                       "run.seed=1", "--repeats", 2)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "of as configured to train.precision=bf16" in result.stdout


def test_cost_is_told_as_batches_grow_until_memory_ends(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    result = benchmark("scaling", tmp_path / "tiny.yaml", "--vary", "batch-size=1,2,10000000000", "--updates", 1,
                       "--repeats", 2, "--plot", tmp_path / "plot.png", "--json", tmp_path / "found.json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    one, two, never = json.loads((tmp_path / "found.json").read_text())
    assert [one["value"], two["value"], never] == [1, 2, {"value": 10000000000, "found": None}]
    assert two["found"]["update_flops"] == 2 * one["found"]["update_flops"]
    rows = [line.split(" | ") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == ["| batch-size", "| ---", "| 1", "| 2", "| 10000000000"]
    assert rows[-1][1] == "out of memory"
    first, second = sorted(two["found"]["settings"][0]["images_per_second"])
    assert rows[3][1].startswith(f"{(first + second) / 2:.4g} ({first:.4g} - {second:.4g})")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (1080, 432)


@pytest.mark.slow
def test_what_was_measured_before_a_failure_is_shown(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    result = benchmark("scaling", tmp_path / "tiny.yaml", "--vary", "model.resolution=16,24", "--updates", 1,
                       "--repeats", 1, "--json", tmp_path / "found.json")  # fmt: skip
    assert result.returncode == 1
    assert "error: measuring model.resolution=24 ended with status 1" in result.stderr
    assert "| 16 | " in result.stdout
    [point] = json.loads((tmp_path / "found.json").read_text())
    assert point["value"] == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.num_classes=0", "--baseline"], "--baseline knows residual networks with classes only"),
        (["train.precison=bf16"], "train.precison"),
        (["--batch-size", "0"], "must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(arguments, words, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    result = benchmark("train", tmp_path / "tiny.yaml", *arguments)
    assert result.returncode != 0 and words in result.stderr and "Traceback" not in result.stderr


def test_operations_are_counted_as_by_hand():
    """Forward is 9.5 GMAC for G and 4.7 for D; a backward pass is twice that, or once to the input alone."""
    from pipeline.config import load_config
    from pipeline.train_benchmark import update_flops

    one, two = (load_config(REPO / "configs/imagenet128.yaml", [f"train.global_batch_size={n}"]) for n in (1, 2))
    assert update_flops(two) == 2 * update_flops(one)
    by_hand = 9.5 + 2 * 4.7 * 3 + 9.5 * 3 + 4.7 * 2  # without attention's padding
    assert update_flops(one) / 2e9 == pytest.approx(by_hand, rel=0.03)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_an_update_is_twice_as_fast_as_the_textbooks(tmp_path):
    """Full width, 128 px, batch 4: 2.4 with bf16 on a quiet machine, 1.4 in float32 (LOG.md); by CPU seconds here."""
    precision = digits.fastest_precision()[:1]
    result = benchmark("train", "configs/imagenet128.yaml", "--batch-size", 4, "--baseline", "--updates", 1,
                       "--repeats", 3, "--json", tmp_path / "found.json", *precision, timeout=800)  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    ours, baseline = (sorted(one["images_per_cpu_second"])[1] for one in found["settings"])
    assert ours / baseline >= (2 if precision else 1.1), result.stdout
    rate = found["settings"][1]["flops_per_second"] / found["convolution_flops_per_second"]
    assert rate >= 0.4, "the baseline is no straw man; half, on a quiet machine"
