"""What all tests share: where the real data lies, and skips that count as failures where everything must run."""

import os
from pathlib import Path

import pytest

# One thread a process: on a busy machine the threads of many small tests wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPO_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory with real ImageNet and CIFAR-10 images beside the checkout; it is no part of the project."""
    directory = Path(os.environ.get("SAGAN_TEST_DATA", REPO_ROOT.parent / "shared" / "data"))
    if not (directory / "ILSVRC2012_img_train.tar").exists():
        pytest.skip(f"no real images in {directory}; put ILSVRC2012_img_train.tar there or set SAGAN_TEST_DATA")
    return directory


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Turns a skip into a failure under SAGAN_TESTS_STRICT_SKIPS, so that CI cannot pass by running nothing."""
    report = yield
    strict = "SAGAN_TESTS_STRICT_SKIPS" in os.environ
    allowed = item.get_closest_marker("gpu") or hasattr(report, "wasxfail") or "no real images" in str(report.longrepr)
    if strict and report.skipped and not allowed:
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> Path:
    """A set of 90 smooth 16 px images in 3 classes, built by the real builder."""
    import numpy as np
    from PIL import Image

    from pipeline import shards, sources

    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("circle", "square", "triangle")):
        folder = root / "images" / name
        folder.mkdir(parents=True)
        for number in range(30):
            small = rng.integers(0, 256, (3 + label, 3 + label, 3), dtype=np.uint8)
            Image.fromarray(small).resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
    source = sources.list_source(root / "images")
    (root / "shards").mkdir()
    shards.build(shards.plan(source, image_size=16, samples_per_shard=32), root / "shards")
    return root / "shards"
