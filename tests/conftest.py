"""What all tests share: where the real data lies, and skips that count as failures where everything must run."""

import contextlib
import os
import runpy
import secrets
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

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
    # What no install line can bring about: a GPU, the shared data, the rights of root.
    beyond = ("no real images", "both nodes are daemons on this host", "as root, and")
    reason = str(report.longrepr)
    allowed = item.get_closest_marker("gpu") or hasattr(report, "wasxfail") or any(word in reason for word in beyond)
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


@pytest.fixture(scope="session")
def set_of_40_blocks(tmp_path_factory):
    """An opened set of 240 raw images of 16 px in 3 classes, 4 shards, 40 blocks; its source `tree` is beside it."""
    import numpy as np
    from PIL import Image

    from pipeline import shard_file, shards
    from pipeline.sources import list_source

    root, rng = tmp_path_factory.mktemp("local"), np.random.default_rng(0)
    for label in range(3):
        (root / f"tree/class{label}").mkdir(parents=True)
        for number in range(80):
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"tree/class{label}/{number:02d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_file, "BLOCK_BYTES", 16_000)
        plan = shards.plan(list_source(root / "tree"), image_size=16, encoding="raw", samples_per_shard=60)
        (root / "set").mkdir()
        found = shards.build(plan, root / "set").shard_set
    assert found.index.num_blocks == 40
    return found


S3_PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "curl")
S3_INSTALL = "apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common curl"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A real Ceph RGW, started once for all tests: an object with `port`, `kill()` and `start()` of its gateway."""
    missing = [program for program in S3_PROGRAMS if not shutil.which(program)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here; as root: {S3_INSTALL}")
    directory = tmp_path_factory.mktemp("rgw") / "ceph"
    script = str(REPO_ROOT / "tests/servers/rgw.sh")
    port, monitor_port = _free_port(), _free_port()

    def run(command: str) -> None:
        arguments = [script, command, *map(str, (directory, port, monitor_port, os.getpid()))]
        done = subprocess.run(arguments, capture_output=True, timeout=200)
        assert done.returncode == 0, done.stderr.decode()

    def kill() -> None:
        os.kill(int((directory / "run/rgw.pid").read_text()), signal.SIGKILL)

    try:
        run("up")
        yield SimpleNamespace(port=port, kill=kill, start=lambda: run("gateway"))
    finally:
        run("down")


@pytest.fixture
def s3_bucket(s3_server, monkeypatch):
    """Function that makes a new bucket and returns its location; the environment holds credentials for it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testkey")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecret123")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    from pipeline import s3_store

    s3_store.client_of.cache_clear()  # they hold the credentials of the test before

    def new_bucket() -> str:
        bucket = f"b{secrets.token_hex(6)}"
        location = f"s3://{bucket}/set?endpoint_url=http://127.0.0.1:{s3_server.port}"
        s3_store.client(s3_store.parse(location), attempts=5).create_bucket(
            Bucket=bucket
        )  # slow after the gateway was killed
        return location

    yield new_bucket
    s3_store.client_of.cache_clear()


@pytest.fixture
def fault_proxy(s3_server):
    """Function (location, faults) -> (the location through a proxy that breaks connections, the proxy)."""
    module = runpy.run_path(str(REPO_ROOT / "tests/servers/fault_proxy.py"))
    with contextlib.ExitStack() as proxies:

        def through(location: str, faults) -> tuple[str, SimpleNamespace]:
            plan = (("answer", module["error_answer"](*fault)) if _is_status(fault) else fault for fault in faults)
            proxy = module["FaultProxy"](s3_server.port, plan)
            proxies.callback(proxy.close)
            return location.replace(f":{s3_server.port}", f":{proxy.port}"), proxy

        yield through


def _is_status(fault) -> bool:
    return fault is not None and isinstance(fault[0], int)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
