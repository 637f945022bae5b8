"""What a person sees: three runs on a real MLflow server, compared in a real browser.

SAGAN_SCREENSHOTS=DIR keeps the pictures.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = "/usr/bin/chromium"
YAML = """
run: {{name: base, dir: {directory}, device: cpu}}
data: {{shards: {shards}, num_workers: 0}}
model: {{resolution: 16, num_classes: 3, attention_resolution: 8, g_channels: 4, d_channels: 8, z_dim: 8}}
train:
  {{steps: 40, global_batch_size: 12, log_every_steps: 2, checkpoint_every_steps: 40, sample_every_steps: 10}}
ema: {{decay: 0.9, start_step: 2}}
tracking: {{uri: "http://127.0.0.1:{port}", experiment: digits}}
"""
RUNS = {
    "with-attention": [],
    "without-attention": ["model.attention_resolution=null"],
    "faster-generator": ["optimizer.lr_g=0.0037"],
}
_PATIENCE = 120_000  # milliseconds; the page is slow to draw on a busy machine

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here; pip install playwright")
    if not Path(CHROMIUM).exists():
        pytest.skip("no Chromium here; as root: apt-get install --no-install-recommends chromium")
    with playwright.sync_playwright() as started:
        # As root, and in containers, Chromium has neither its sandbox nor much shared memory.
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of an MLflow server that keeps artifacts itself."""
    home = tmp_path_factory.mktemp("server")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [Path(sys.executable).with_name("mlflow"), "server", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}",
               "--artifacts-destination", str(home / "served")]  # fmt: skip
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not answers(port):
            assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.5)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # a group of its own, with its workers
        process.wait()


def answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def runs(server, tiny_shards, tmp_path_factory) -> dict[str, str]:
    """MLflow's ids of three finished runs with different settings, by name."""
    from pipeline.config import load_config
    from pipeline.mlflow_sender import count_unsent
    from pipeline.trainer import train

    directory = tmp_path_factory.mktemp("runs")
    path = directory / "recipe.yaml"
    path.write_text(YAML.format(directory=directory, shards=tiny_shards, port=server))
    found = {}
    for name, overrides in RUNS.items():
        config = load_config(path, [f"run.name={name}", *overrides])
        train(config)
        if count_unsent(config.run_dir) != (0, 0):  # a busy machine, and the sender has a minute only
            train(config)
        assert count_unsent(config.run_dir) == (0, 0)
        found[name] = json.loads((config.run_dir / "mlflow_run.json").read_text())["run_id"]
    return found


@pytest.fixture(scope="module")
def look(browser, server, tmp_path_factory):
    """Function (path, ready) that opens a page and waits for an element; pages close at the end."""
    context = browser.new_context(viewport={"width": 1500, "height": 950})
    context.set_default_timeout(_PATIENCE)
    context.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
    keep = Path(os.environ.get("SAGAN_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    keep.mkdir(parents=True, exist_ok=True)

    def open_page(path: str, ready: str, name: str):
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server}/#/{path}")
        page.locator(ready).first.wait_for()
        page.wait_for_timeout(3000)  # what is drawn last moves what is there
        page.screenshot(path=keep / f"{name}.png", timeout=_PATIENCE)
        page.keep = keep
        return page

    yield open_page
    context.close()


def experiment_id(server: int) -> str:
    url = f"http://127.0.0.1:{server}/api/2.0/mlflow/experiments/get-by-name?experiment_name=digits"
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)["experiment"]["experiment_id"]


def test_the_compare_page_shows_settings_and_scores_side_by_side(look, runs, server):
    ids = json.dumps(list(runs.values()), separators=(",", ":"))
    page = look(f'compare-runs?runs={ids}&experiments=["{experiment_id(server)}"]', "text=Comparing 3 Runs", "compare")
    text = page.locator("body").inner_text()
    for name in (*runs, "optimizer.lr_g", "0.0037", "0.0001", "model.attention_resolution", "null", "train/d_loss"):
        assert name in text, name
    page.close()


def test_curves_of_all_three_and_a_slider_through_their_pictures(look, runs, server):
    page = look(f"experiments/{experiment_id(server)}/runs?compareRunsMode=CHART", ".js-plotly-plot", "curves")
    page.get_by_placeholder("Search metric charts").fill("train/d_loss")
    drawn = "[...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => plot.data)"
    page.wait_for_function(
        f"() => new Set({drawn}.filter(line => line.x.length == 20).map(line => line.name)).size == 3"
    )
    lines = page.evaluate(f"() => {drawn}.map(line => [line.name, [...line.x]])")
    assert {name for name, _ in lines} == set(runs)
    assert all(x == list(range(2, 41, 2)) for _, x in lines if x)

    page.get_by_placeholder("Search metric charts").fill("samples")
    page.locator("text=attention").first.wait_for()  # the other series
    fetched: set[str] = set()

    def note(answer) -> None:
        if answer.status == 200 and "images%2Fsamples%2Bstep%2B40%2B" in answer.url:
            fetched.add(answer.url.rpartition("run_uuid=")[2])

    page.on("response", note)
    page.get_by_role("slider").last.focus()
    deadline = time.monotonic() + _PATIENCE / 1000
    while fetched != set(runs.values()):  # one series for each run, moved by one slider
        assert time.monotonic() < deadline, fetched
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(500)
    page.screenshot(path=page.keep / "pictures.png", timeout=_PATIENCE)
    page.close()


def test_a_registered_model_loads_from_the_server(runs, server, tmp_path):
    code = (
        "import mlflow, pandas as pd\n"
        "model = mlflow.pyfunc.load_model('models:/digits-with-attention/1')\n"
        "print(model.predict(pd.DataFrame({'seed': [1, 2], 'label': [0, 2]})).shape)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{server}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "(2, 16, 16, 3)" in done.stdout, done.stderr
