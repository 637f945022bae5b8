"""What all tests share: where the real data lies, and skips that count as failures where everything must run."""

import os
from pathlib import Path

import pytest

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
