"""Tracking against a real MLflow store: each point once, whatever is killed, away or broken."""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import mlflow_sender, tracking
from pipeline.config import ConfigError, config_from_dict
from pipeline.journal import Journal
from pipeline.mlflow_sender import Sender, count_unsent
from pipeline.tracking import RunFacts, log_evaluation, open_tracker

# MLflow's own: its queries use an option that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")

FACTS = RunFacts(dataset_id="d" * 64, world_size=2, hostnames=("node1",))


def make_config(run_dir: Path, steps: int = 100, **tracking_values):
    return config_from_dict(
        {
            "run": {"name": run_dir.name, "dir": str(run_dir.parent)},
            "data": {"shards": "shards"},
            "model": {"resolution": 16, "num_classes": 3, "attention_resolution": 8},
            "train": {"steps": steps, "global_batch_size": 4},
            "tracking": tracking_values,
        },
        "test",
    )


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """A database with MLflow's tables, made once, because they take seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of MLflow's own imports
        from mlflow import MlflowClient
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(empty_database, tmp_path, monkeypatch) -> Path:
    """The default store, beside the run directories."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs").mkdir()
    return Path(shutil.copy(empty_database, tmp_path / "runs" / "mlflow.db"))


@pytest.fixture
def run_dir(database) -> Path:
    return database.parent / "run1"


def deliver(config, run_dir: Path) -> None:
    """What the sender's process does, in this one."""
    Sender(tracking._destination(config.tracking, run_dir)).deliver()


def off(config):
    """The same configuration, journal only."""
    return replace(config, tracking=replace(config.tracking, enabled=False))


def train(config, steps, status="FINISHED", facts=FACTS) -> None:
    """A training that only tells; nothing is sent."""
    tracker = open_tracker(off(config), facts, is_main=True)
    for step in steps:
        tracker.log_metrics(step, {"train/d_loss": 1 / step, "train/g_loss": -1.0 * step})
    tracker.close(status)


def stored_points(database: Path) -> list[tuple[str, int, float]]:
    """(metric, step, value) of all runs, straight from the tables, without the system's metrics."""
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select key, step, value from metrics where key not like 'system/%'").fetchall()
    connection.close()
    return sorted(rows)


def expected_points(steps) -> list[tuple[str, int, float]]:
    return sorted([("train/d_loss", n, 1 / n) for n in steps] + [("train/g_loss", n, -1.0 * n) for n in steps])


def client_of(database: Path):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{database}")


def only_run(client, experiment="sagan"):
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_a_kill_between_any_two_messages_loses_and_doubles_nothing(database, tmp_path, monkeypatch):
    """Kills the sender before and after each of its requests and notes in turn; another one goes on."""
    monkeypatch.setattr(mlflow_sender, "_CHUNK_BYTES", 2000)  # several requests for a small journal
    moments = 0

    def killed_at(number: int, after: bool):
        def wrap(function):
            def wrapped(*arguments, **keywords):
                nonlocal moments
                moments += 1
                if moments == number and not after:
                    raise Killed
                result = function(*arguments, **keywords)
                if moments == number and after:
                    raise Killed
                return result

            return wrapped

        return wrap

    def send(run_dir, wrap) -> None:
        sender = Sender(tracking._destination(make_config(run_dir).tracking, run_dir))
        for name in ("create_run", "log_batch", "log_artifact", "set_terminated", "update_run"):
            monkeypatch.setattr(sender._client, name, wrap(getattr(sender._client, name)))
        monkeypatch.setattr(sender, "_write_state", wrap(sender._write_state))
        sender.deliver()

    steps = range(1, 31)
    number, counts = 0, []
    while not counts or number <= counts[0]:
        for after in (False, True):
            run_dir = database.parent / f"run-{number}-{after}"
            config = make_config(run_dir)
            train(config, steps)
            if number:
                moments = 0
                with pytest.raises(Killed):
                    send(run_dir, killed_at(number, after))
            moments = 0
            send(run_dir, killed_at(0, after))  # never
            counts.append(moments)
        number += 1
    assert counts[0] >= 10
    client = client_of(database)
    runs = client.search_runs([client.get_experiment_by_name("sagan").experiment_id])
    assert len(runs) == 2 * number  # one each
    assert all(run.info.status == "FINISHED" for run in runs)
    assert stored_points(database) == sorted(expected_points(steps) * len(runs))


def test_a_resumed_run_is_the_same_run_and_its_replayed_steps_are_not_sent_again(database, run_dir):
    config = make_config(run_dir)
    train(config, range(1, 11), "KILLED")
    deliver(config, run_dir)
    train(config, range(5, 16), "FINISHED")
    deliver(config, run_dir)
    run = only_run(client_of(database))
    assert run.info.run_name == "run1"
    assert run.data.tags["restarts"] == "1"
    assert stored_points(database) == expected_points(range(1, 16))


def test_points_keep_the_time_they_were_made_at(database, run_dir):
    config = make_config(run_dir)
    before = int(time.time() * 1000)
    train(config, [1])
    made = int(time.time() * 1000)
    time.sleep(0.05)
    deliver(config, run_dir)
    client = client_of(database)
    (point,) = client.get_metric_history(only_run(client).info.run_id, "train/d_loss")
    assert before <= point.timestamp <= made + 1


def test_parameters_stay_and_what_a_resume_changes_becomes_a_tag(database, run_dir):
    train(make_config(run_dir, steps=100), [1])
    deliver(make_config(run_dir), run_dir)
    for steps in (200, 200, 300):
        train(make_config(run_dir, steps=steps), [2])
        deliver(make_config(run_dir), run_dir)
    data = only_run(client_of(database)).data
    assert data.params["train.steps"] == "100"
    assert data.params["optimizer.betas"] == "[0.0, 0.999]" and data.params["model.sync_batch_norm"] == "true"
    assert data.tags["changed.train.steps"] == "100 -> 200 -> 300"
    assert [name for name in data.tags if name.startswith("changed.")] == ["changed.train.steps"]


@pytest.mark.parametrize("status", ["FINISHED", "KILLED", "FAILED"])
def test_status_follows_the_training(database, run_dir, status):
    config = make_config(run_dir)
    train(config, [1], status)
    deliver(config, run_dir)
    client = client_of(database)
    assert only_run(client).info.status == status
    tracker = open_tracker(off(config), FACTS, is_main=True)
    deliver(config, run_dir)
    assert only_run(client).info.status == "RUNNING"
    tracker.close("FINISHED")
    deliver(config, run_dir)
    assert only_run(client).info.status == "FINISHED"


def test_tags_tell_where_the_run_comes_from(database, run_dir, repo_root, monkeypatch):
    monkeypatch.setattr("sys.argv", ["launch/train.py", "configs/demo.yaml"])
    config = make_config(run_dir)
    config = replace(config, model=replace(config.model, sync_batch_norm=False))
    train(config, [1], facts=RunFacts("d" * 64, 4, ("node1", "node2")))
    deliver(config, run_dir)
    tags = only_run(client_of(database)).data.tags
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repo_root, capture_output=True, text=True).stdout.strip()
    assert tags["mlflow.source.git.commit"] == (git or "unknown")
    assert (tags["dataset_id"], tags["world_size"], tags["hostnames"]) == ("d" * 64, "4", "node1 node2")
    assert tags["batch_norm"].startswith("unsynchronised")
    assert (tags["restarts"], tags["command"]) == ("0", "launch/train.py configs/demo.yaml")


def test_a_slurm_job_is_named_in_tags_and_none_outside_of_one():
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]"}
    expected = {"slurm.job_id": "17", "slurm.nodes": "node[1-2]", "slurm.restarts": "0"}
    assert tracking._slurm_tags(job) == expected
    assert tracking._slurm_tags(job | {"SLURM_RESTART_COUNT": "3"}) == expected | {"slurm.restarts": "3"}
    assert tracking._slurm_tags({"HOME": "/"}) == {}


def test_pictures_become_a_series_by_step_once(database, run_dir):
    from PIL import Image

    config = make_config(run_dir)
    tracker = open_tracker(off(config), FACTS, is_main=True)
    (run_dir / "samples").mkdir()
    for step in (10, 20):
        picture = run_dir / "samples" / f"step-{step:08d}.png"
        Image.new("RGB", (600, 300), (step, 0, 0)).save(picture)
        tracker.log_image(step, picture, "samples")
        tracker.log_image(step, picture, "samples")
    tracker.close("FINISHED")
    deliver(config, run_dir)
    state = json.loads((run_dir / "mlflow_run.json").read_text())
    (run_dir / "mlflow_run.json").write_text(json.dumps(state | {"sent": {}}))  # as after a kill: all is sent again
    deliver(config, run_dir)
    client = client_of(database)
    run = only_run(client)
    assert run.data.tags["mlflow.loggedImages"] == "True"
    names = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")]
    shape = re.compile(r"samples\+step\+(\d+)\+timestamp\+\d+\+[0-9a-f-]{36}(\.png|\+compressed\.webp)")
    found = sorted(shape.fullmatch(name).groups() for name in names)
    assert found == [("10", "+compressed.webp"), ("10", ".png"), ("20", "+compressed.webp"), ("20", ".png")]
    stored = database.parent / "mlartifacts" / run.info.run_id / "artifacts" / "images"
    with Image.open(next(stored.glob("*+20+*.png"))) as full, Image.open(next(stored.glob("*+20+*.webp"))) as small:
        assert full.size == (600, 300) and full.getpixel((5, 5)) == (20, 0, 0)
        assert small.size == (256, 128)


def test_names_of_pictures_are_those_of_mlflow_itself(database, run_dir):
    """Against MlflowClient.log_image, so that another release with other names is noticed."""
    from PIL import Image

    config = make_config(run_dir)
    tracker = open_tracker(off(config), FACTS, is_main=True)
    picture = Image.new("RGB", (40, 40))
    picture.save(run_dir / "a.png")
    tracker.log_image(7, run_dir / "a.png", "attention/late")
    tracker.close("FINISHED")
    deliver(config, run_dir)
    client = client_of(database)
    run_id = only_run(client).info.run_id
    ours = {file.path for file in client.list_artifacts(run_id, "images")}
    client.log_image(run_id, picture, key="attention/late", step=7, timestamp=1700000000000, synchronous=True)
    theirs = {file.path for file in client.list_artifacts(run_id, "images")} - ours

    def without_random_parts(names: set[str]) -> set[str]:
        return {re.sub(r"\+\d{13}\+[0-9a-f-]{36}", "+TIME+NUMBER", name) for name in names}

    assert without_random_parts(ours) == without_random_parts(theirs) and len(theirs) == 2


def test_the_page_of_a_run_tells_how_to_make_it_again(database, run_dir, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "configs/demo.yaml", "run.name=a b"])
    config = make_config(run_dir)
    dataset = {"name": "digits", "digest": "d" * 32, "source": '{"uri": "shards"}', "source_type": "local",
               "profile": '{"num_images": 7}', "context": "training"}  # fmt: skip
    facts = replace(FACTS, dataset=dataset, device="cpu")
    for _ in range(2):  # a restart notes the same input
        train(config, [1], facts=facts)
    (run_dir / "environment.txt").write_text("torch==2\n")
    tracker = open_tracker(off(config), facts, is_main=True)
    tracker.log_files(1, [run_dir / "environment.txt"], "run")
    tracker.close("FINISHED")
    deliver(config, run_dir)
    client = client_of(database)
    run = only_run(client)
    (put_in,) = run.inputs.dataset_inputs
    assert (put_in.dataset.name, put_in.dataset.digest, put_in.dataset.source_type) == ("digits", "d" * 32, "local")
    assert [(tag.key, tag.value) for tag in put_in.tags] == [("mlflow.data.context", "training")]
    assert run.data.tags["recipe"] == "demo"
    commit = run.data.tags["mlflow.source.git.commit"]
    lines = run.data.tags["mlflow.note.content"].splitlines()
    assert f"git checkout {commit if commit != 'unknown' else 'COMMIT'}" in lines
    launcher = "accelerate launch --config_file configs/accelerate/cpu_two_processes.yaml --num_processes 2"
    assert f"{launcher} launch/train.py configs/demo.yaml 'run.name=a b'" in lines
    assert [file.path for file in client.list_artifacts(run.info.run_id, "run")] == ["run/environment.txt"]


@pytest.mark.parametrize(
    ("facts", "launcher"),
    [
        (RunFacts("d", 1, ("a",)), "python"),
        (RunFacts("d", 8, ("a",)), "accelerate launch --config_file configs/accelerate/one_machine.yaml"),
        (RunFacts("d", 8, ("a",), "zero2"), "accelerate launch --config_file configs/accelerate/deepspeed_zero2.yaml"),
        (RunFacts("d", 16, ("a", "b")), "accelerate launch --config_file configs/accelerate/multi_node.yaml"),
    ],
)
def test_the_command_names_the_launcher_that_there_is(facts, launcher, repo_root, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "configs/cifar10.yaml"])
    (line,) = [line for line in tracking._description(facts, "c").splitlines() if "launch/train.py" in line]
    assert line.startswith(launcher)
    assert all((repo_root / path).exists() for path in re.findall(r"configs/\S+", line))


def export_generator(run_dir: Path, num_classes: int, step: int = 3):
    """A generator with seeded weights and the folder that training would leave of it."""
    import torch

    from pipeline.model_folder import write_folder
    from sagan import Generator

    torch.manual_seed(step)
    arguments = {"resolution": 16, "channels": 8, "num_classes": num_classes, "z_dim": 12, "attention_resolution": 8}
    generator = Generator(**arguments).eval().requires_grad_(False)
    (run_dir / "model").mkdir(parents=True, exist_ok=True)
    write_folder(generator, arguments, {"provenance": {"step": step}}, run_dir / "model", "resnet")
    return generator


def log_model(config, run_dir: Path, step: int = 3) -> None:
    """A training that leaves a model, told twice, as after a lost answer."""
    tracker = open_tracker(off(config), FACTS, is_main=True)
    tracker.log_model(step, run_dir / "model")
    tracker.close("FINISHED")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own, of its imports and of pandas; the sender runs with -W ignore
        deliver(config, run_dir)
        state = json.loads((run_dir / "mlflow_run.json").read_text())
        (run_dir / "mlflow_run.json").write_text(json.dumps(state | {"sent": {}}))
        deliver(config, run_dir)


def assert_model_makes_these_images(uri: str, database: Path, generator) -> None:
    """Loads a registered model with mlflow.pyfunc, as a stranger would, in a process without this project."""
    import torch

    seeds, labels = [3, 4, 3], [0, 2, 1]
    code = (
        "import sys, json, mlflow\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "import pandas as pd\n"
        "model = mlflow.pyfunc.load_model(sys.argv[2])\n"
        "frame = pd.DataFrame(json.loads(sys.argv[3]))\n"
        "images = model.predict(frame)\n"
        "assert 'pipeline' not in sys.modules and 'MLmodel' not in sys.modules['sagan'].__file__\n"
        "assert 'code' in sys.modules['sagan'].__file__.split('/'), sys.modules['sagan'].__file__\n"
        "print(json.dumps([str(images.dtype), images.tolist(), model.metadata.get_input_schema().input_names()]))\n"
    )
    rows = {"seed": seeds} | ({"label": labels} if generator.num_classes else {})
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, f"sqlite:///{database}", uri, json.dumps(rows)],
        cwd=database.parent, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dtype, images, columns = json.loads(done.stdout.splitlines()[-1])
    z = torch.stack([torch.randn(12, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    expected = generator(z, torch.tensor(labels) if generator.num_classes else None)
    found = torch.tensor(images).permute(0, 3, 1, 2)
    assert dtype == "uint8" and columns == list(rows)
    assert ((expected + 1) * 127.5 - found).abs().max() <= 0.5 + 1e-3


def test_a_finished_run_is_a_registered_model_once(database, run_dir):
    generator = export_generator(run_dir, num_classes=3)
    log_model(make_config(run_dir), run_dir)
    client = client_of(database)
    (version,) = client.search_model_versions("name = 'sagan-run1'")
    assert version.run_id == only_run(client).info.run_id and version.tags == {"step": "3"}
    assert_model_makes_these_images("models:/sagan-run1/1", database, generator)


@pytest.mark.slow
def test_an_extended_run_has_a_version_for_each_end(database, run_dir, capfd):
    """The second one's files took the place of the first one's."""
    first = export_generator(run_dir, num_classes=3)
    log_model(make_config(run_dir), run_dir)
    second = export_generator(run_dir, num_classes=3, step=6)
    log_model(make_config(run_dir), run_dir, step=6)
    assert "of step 3 was removed or replaced before it" in capfd.readouterr().err  # when all was sent once more
    versions = client_of(database).search_model_versions("name = 'sagan-run1'")
    assert {int(version.version): version.tags["step"] for version in versions} == {1: "3", 2: "6"}
    assert_model_makes_these_images("models:/sagan-run1/1", database, first)
    assert_model_makes_these_images("models:/sagan-run1/2", database, second)


def test_a_model_of_an_experiment_with_a_path_for_a_name(database, run_dir):
    export_generator(run_dir, num_classes=3)
    log_model(make_config(run_dir, experiment="/Users/me/sagan: faces"), run_dir)
    assert len(client_of(database).search_model_versions("name = '-Users-me-sagan- faces-run1'")) == 1


@pytest.mark.s3
@pytest.mark.slow
def test_a_model_comes_back_from_object_storage(database, run_dir, s3_bucket, s3_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{s3_server.port}")
    generator = export_generator(run_dir, num_classes=0)
    location = s3_bucket().partition("?")[0]
    log_model(make_config(run_dir, artifact_location=location), run_dir)
    (version,) = client_of(database).search_model_versions("name = 'sagan-run1'")
    assert version.source.startswith(location)
    assert_model_makes_these_images("models:/sagan-run1/1", database, generator)


def test_a_broken_artifact_store_holds_up_no_numbers(database, run_dir):
    config = make_config(run_dir, artifact_location="file:///proc/nobody/writes/here")
    train(config, range(1, 4))
    picture = run_dir / "grid.png"
    picture.touch()
    with Journal(run_dir / "journals" / "files-samples.jsonl") as journal:
        journal.log(1, files={"grid.png": "samples"})
    with pytest.raises(OSError):
        deliver(config, run_dir)
    assert stored_points(database) == expected_points(range(1, 4))
    assert count_unsent(run_dir) == (0, 1)


def test_a_removed_picture_is_told_and_left_out(database, run_dir, capfd):
    config = make_config(run_dir)
    train(config, [1])
    with Journal(run_dir / "journals" / "files-samples.jsonl") as journal:
        journal.log(1, files={"samples/gone.png": "samples"})
    deliver(config, run_dir)
    assert "gone.png was removed before it could be sent" in capfd.readouterr().err
    assert count_unsent(run_dir) == (0, 0)


def test_evaluation_joins_the_finished_run_at_the_training_step_once(database, run_dir, capfd):
    config = make_config(run_dir)
    train(config, range(1, 4))
    deliver(config, run_dir)
    result = run_dir / "result.json"
    result.write_text("{}")
    log_evaluation(off(config), run_dir, 2, {"eval/fid": 12.5}, [result], {"evaluation.features": "inception"})
    log_evaluation(off(config), run_dir, 2, {"eval/fid": 12.5, "eval/kid_mean": 0.5}, [result])
    assert capfd.readouterr().err == ""
    log_evaluation(off(config), run_dir, 2, {"eval/fid": 13.5})
    assert "eval/fid of step 2 is on record as 12.5; 13.5 is not added" in capfd.readouterr().err
    deliver(config, run_dir)
    client = client_of(database)
    run = only_run(client)
    assert run.info.status == "FINISHED"
    assert run.data.tags["evaluation.features"] == "inception"
    scores = [point for point in stored_points(database) if point[0].startswith("eval/")]
    assert scores == [("eval/fid", 2, 12.5), ("eval/kid_mean", 2, 0.5)]
    (file,) = client.list_artifacts(run.info.run_id, "evaluation/step-00000002")
    assert file.path.endswith("result.json")


def test_other_weights_of_a_step_have_a_point_of_their_own(database, run_dir):
    """As after a rollback: MLflow forgets nothing, so the later point counts and a tag says so."""
    config = make_config(run_dir)
    train(config, [1, 2])
    for weights, fid in (("a" * 64, 9.0), ("a" * 64, 9.0), ("b" * 64, 4.0), ("b" * 64, 4.0)):
        log_evaluation(off(config), run_dir, 2, {"eval/fid": fid}, weights=weights)
    log_evaluation(off(config), run_dir, 2, {"eval/fid_raw": 7.0}, weights="c" * 64)
    deliver(config, run_dir)
    scores = [point for point in stored_points(database) if point[0].startswith("eval/")]
    assert scores == [("eval/fid", 2, 4.0), ("eval/fid", 2, 9.0), ("eval/fid_raw", 2, 7.0)]
    run = only_run(client_of(database))
    assert run.data.metrics["eval/fid"] == 4.0
    assert "evaluation.replaced.step-00000002" in run.data.tags


def test_evaluation_of_a_training_that_is_under_way_elsewhere(database, run_dir):
    config = make_config(run_dir)
    tracker = open_tracker(off(config), FACTS, is_main=True)
    tracker.log_metrics(1, {"train/d_loss": 1.0, "train/g_loss": -1.0})
    trainers_sender = Sender(tracking._destination(config.tracking, run_dir))
    trainers_sender.deliver()
    log_evaluation(off(config), run_dir, 1, {"eval/fid": 12.5})
    deliver(config, run_dir)
    trainers_sender.deliver()  # knows nothing of the other's notes
    tracker.log_metrics(2, {"train/d_loss": 0.5, "train/g_loss": -2.0})
    trainers_sender.deliver()
    deliver(config, run_dir)
    tracker.close("FINISHED")
    assert stored_points(database) == [("eval/fid", 1, 12.5), *expected_points([1, 2])]
    assert only_run(client_of(database)).info.status == "RUNNING"


def test_nan_is_nan_and_infinity_is_noted(database, run_dir):
    config = make_config(run_dir)
    tracker = open_tracker(off(config), FACTS, is_main=True)
    tracker.log_metrics(1, {"train/d_loss": math.nan, "train/g_loss": math.inf})
    tracker.close("FAILED")
    deliver(config, run_dir)
    deliver(config, run_dir)
    client = client_of(database)
    run = only_run(client)
    (nan,) = client.get_metric_history(run.info.run_id, "train/d_loss")
    (infinite,) = client.get_metric_history(run.info.run_id, "train/g_loss")
    assert math.isnan(nan.value)
    assert infinite.value == sys.float_info.max
    assert run.data.tags["infinite.train/g_loss"] == "inf at step 1; shown as 1.8e308"


def test_system_metrics_are_journaled_and_go_on_where_they_ended(database, run_dir):
    config = make_config(run_dir)
    train(config, [1])
    for _ in range(2):  # two processes, one after the other
        sampler = mlflow_sender._SystemSampler(run_dir)
        for _ in range(2 * mlflow_sender._SAMPLES_PER_SYSTEM_POINT):
            sampler.sample()
        sampler._journal.close()
    deliver(config, run_dir)
    client = client_of(database)
    run_id = only_run(client).info.run_id
    for name in ("system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"):
        points = client.get_metric_history(run_id, name)
        assert [point.step for point in points] == [0, 1, 2, 3]
        assert all(point.value >= 0 for point in points)


def test_another_store_gets_the_whole_run(database, empty_database, run_dir, tmp_path):
    train(make_config(run_dir), range(1, 4))
    deliver(make_config(run_dir), run_dir)
    other = Path(shutil.copy(empty_database, tmp_path / "other.db"))
    moved = make_config(run_dir, uri=f"sqlite:///{other}")
    train(moved, range(4, 6))
    deliver(moved, run_dir)
    assert stored_points(other) == expected_points(range(1, 6))
    assert only_run(client_of(other)).data.params["train.steps"] == "100"
    assert stored_points(database) == expected_points(range(1, 4))


def test_run_directories_may_be_moved_with_their_store(database, run_dir, tmp_path):
    train(make_config(run_dir), range(1, 4))
    deliver(make_config(run_dir), run_dir)
    moved = tmp_path / "elsewhere"
    database.parent.rename(moved)
    config = make_config(moved / "run1")
    train(config, range(4, 6))
    deliver(config, moved / "run1")
    only_run(client_of(moved / "mlflow.db"))
    assert stored_points(moved / "mlflow.db") == expected_points(range(1, 6))


def test_the_address_is_chosen_in_order_and_passwords_stay_out(tmp_path, monkeypatch, capfd):
    run_dir = tmp_path / "runs" / "run1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment")
    config = make_config(run_dir, uri="postgresql://me:secret@host/db")
    assert tracking._choose_uri(config.tracking, run_dir) == ("postgresql://me:secret@host/db", "tracking.uri")
    other = make_config(run_dir)
    assert tracking._choose_uri(other.tracking, run_dir) == ("http://from-environment", "MLFLOW_TRACKING_URI")
    run_dir.mkdir(parents=True)
    state = {"store": "http://before", "experiment": "sagan", "run_key": "k"}
    (run_dir / "mlflow_run.json").write_text(json.dumps(state))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking._choose_uri(other.tracking, run_dir)[0] == "http://before"
    (run_dir / "mlflow_run.json").unlink()
    assert tracking._destination(other.tracking, run_dir).uri == f"sqlite:///{tmp_path}/runs/mlflow.db"

    monkeypatch.setattr(sys, "argv", ["train.py", "tracking.uri=postgresql://me:secret@host/db"])
    train(config, [1])
    tracking._introduce(config.tracking, run_dir, FACTS)
    assert "postgresql://***@host/db (tracking.uri)" in capfd.readouterr().err
    assert "secret" not in (run_dir / "journal.jsonl").read_text()


def test_several_machines_on_a_sqlite_file_are_warned(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = tmp_path / "runs" / "run1"
    for uri, warned in ((None, True), ("sqlite:////disk/mlflow.db", True), ("http://server:5000", False)):
        tracking._introduce(make_config(run_dir, uri=uri).tracking, run_dir, RunFacts("d", 16, ("node1", "node2")))
        assert ("sqlite on a network disk" in capfd.readouterr().err) == warned


def test_an_address_without_a_scheme_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tracking\.uri must be an address such as .* got 'localhost:5000'"):
        make_config(tmp_path / "run1", uri="localhost:5000")


def test_other_ranks_tell_nobody(tmp_path):
    tracker = open_tracker(make_config(tmp_path / "run1"), FACTS, is_main=False)
    tracker.log_metrics(1, {"train/d_loss": 1.0})
    tracker.log_image(1, tmp_path / "a.png", "samples")
    tracker.log_files(1, [tmp_path / "a.txt"], "run")
    tracker.log_model(1, tmp_path)
    tracker.close("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_the_trainer_never_imports_mlflow():
    code = "import sys, pipeline.tracking; assert not {'mlflow', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


# A training that only tells: argv = run directory, tracking values as JSON, first step, last step, seconds per step.
TRAINING = """
import json, sys, time
from pathlib import Path
from pipeline.config import config_from_dict
from pipeline.tracking import RunFacts, open_tracker
run_dir, values, first, last, pause = Path(sys.argv[1]), json.loads(sys.argv[2]), *map(float, sys.argv[3:])
config = config_from_dict({
    "run": {"name": run_dir.name, "dir": str(run_dir.parent)}, "data": {"shards": "shards"},
    "model": {"resolution": 16, "num_classes": 3, "attention_resolution": 8},
    "train": {"steps": 100, "global_batch_size": 4}, "tracking": values,
}, "test")
tracker = open_tracker(config, RunFacts("d" * 64, 2, ("node1",)), is_main=True)
slowest = 0.0
for step in range(int(first), int(last) + 1):
    started = time.perf_counter()
    tracker.log_metrics(step, {"train/d_loss": 1 / step, "train/g_loss": -1.0 * step})
    slowest = max(slowest, time.perf_counter() - started)
    time.sleep(pause)
tracker.close("FINISHED")
print("slowest log_metrics", slowest)
"""


@pytest.fixture
def start_training():
    """Starts trainings; none outlives the test."""
    started = []

    def start(run_dir, values, first, last, pause, errors=subprocess.PIPE) -> subprocess.Popen:
        arguments = [str(run_dir), json.dumps(values), str(first), str(last), str(pause)]
        command = [sys.executable, "-c", TRAINING, *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True))
        return started[-1]

    yield start
    for training in started:
        training.kill()
        training.communicate()


def sender_of(training: subprocess.Popen):
    import psutil

    children = psutil.Process(training.pid).children()
    return next((child for child in children if "pipeline.mlflow_sender" in child.cmdline()), None)


def wait_until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


@pytest.mark.slow
def test_each_point_is_there_once_after_sigkills(database, run_dir, start_training):
    """Kills trainings and senders at random moments; each resume repeats steps, as after a checkpoint."""
    rng = random.Random(0)
    for attempt in range(3):
        written = count_lines(run_dir)
        training = start_training(run_dir, {}, max(1, written - 20), 1_000_000, 0.01)
        sender = None
        wait_until(lambda training=training, written=written: count_lines(run_dir) > written + 100)
        time.sleep(rng.uniform(0, 12))
        if attempt != 1:  # the second time the sender outlives its training and finishes beside the next one
            sender = sender_of(training)
        training.kill()
        if sender is not None:
            sender.kill()
        training.communicate()
    last = count_lines(run_dir) + 100
    training = start_training(run_dir, {}, last - 150, last, 0.0)
    _, errors = training.communicate(timeout=200)
    assert training.returncode == 0 and "not sent" not in errors, errors
    wait_until(lambda: only_run(client_of(database)).info.status == "FINISHED")
    assert stored_points(database) == expected_points(range(1, last + 1))
    assert only_run(client_of(database)).data.tags["restarts"] == "3"


def count_lines(run_dir: Path) -> int:
    journal = run_dir / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def test_a_training_that_dies_without_a_word_has_failed(database, run_dir, start_training):
    training = start_training(run_dir, {}, 1, 100_000, 0.01)
    wait_until(lambda: count_lines(run_dir) > 20)
    sender = sender_of(training)
    wait_until(lambda: ignores(sender.pid, signal.SIGTERM))
    sender.terminate()  # a scheduler tells every process to end; the last points are still to come
    training.kill()
    training.communicate()  # until the sender, which holds the pipes too, has ended
    assert only_run(client_of(database)).info.status == "FAILED"
    assert stored_points(database) == expected_points(range(1, count_lines(run_dir)))
    assert count_unsent(run_dir) == (0, 0)


def ignores(pid: int, number: signal.Signals) -> bool:
    (mask,) = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_without_a_server_training_goes_on_and_says_what_remains(database, run_dir, start_training, capfd):
    values = {"uri": f"http://127.0.0.1:{free_port()}"}
    training = start_training(run_dir, values, 1, 50, 0.0)
    output, errors = training.communicate(timeout=200)
    assert training.returncode == 0
    assert f"cannot send to {values['uri']}: [Errno 111] Connection refused; going on without" in errors
    assert "100 points and 0 files are not sent yet; the next start or evaluation sends them" in errors
    assert float(output.split()[-1]) < 2  # seconds of the slowest log_metrics: none waited
    config = make_config(run_dir, **values)
    log_evaluation(config, run_dir, 50, {"eval/fid": 12.5})
    assert "101 points and 0 files are not sent yet" in capfd.readouterr().err
    Sender(replace(tracking._destination(config.tracking, run_dir), uri=f"sqlite:///{database}")).deliver()
    assert stored_points(database) == [("eval/fid", 50, 12.5), *expected_points(range(1, 51))]
    assert count_unsent(run_dir) == (0, 0)


def test_a_run_that_its_store_has_lost_is_told_with_the_way_out(database, empty_database, run_dir, capfd):
    train(make_config(run_dir), [1])
    deliver(make_config(run_dir), run_dir)
    shutil.copy(empty_database, run_dir.parent / "new.db")
    train(make_config(run_dir), [2])
    destination = replace(
        tracking._destination(make_config(run_dir).tracking, run_dir), uri=f"sqlite:///{run_dir.parent}/new.db"
    )
    assert not Sender(destination)._attempt()
    assert f"remove {run_dir}/mlflow_run.json to send everything to a new MLflow run" in capfd.readouterr().err
    (run_dir / "mlflow_run.json").unlink()
    assert Sender(destination)._attempt()
    assert stored_points(run_dir.parent / "new.db") == expected_points([1, 2])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def mlflow_server(database: Path, port: int):
    command = [Path(sys.executable).parent / "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}"]
    command += ["--artifacts-destination", str(database.parent / "served")]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        command,
        env=os.environ | quiet,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a group of its own, to be killed with its workers
    )

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_until(answers, 200)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_two_senders_of_one_run_keep_each_others_place(database, run_dir, monkeypatch):
    """The training's sender noted its own place over the evaluation's, whose files were then sent again."""
    config = make_config(run_dir)
    train(config, [1])
    ours = Sender(tracking._destination(config.tracking, run_dir))
    ours.deliver()
    result = run_dir / "result.json"
    result.touch()
    log_evaluation(config, run_dir, 1, {"eval/fid": 12.5}, [result])
    train(config, [2])
    monkeypatch.setattr(Sender, "_send_file", lambda *_: pytest.fail("a file that was sent is sent again"))
    ours.deliver()
    assert count_unsent(run_dir) == (0, 0)
    assert stored_points(database) == sorted([("eval/fid", 1, 12.5), *expected_points([1, 2])])


def after_a_second(function):
    """The function, so slow that another may come in between."""

    def waits(*arguments):
        time.sleep(1)
        return function(*arguments)

    return waits


def test_two_senders_at_once_make_one_mlflow_run(database, run_dir, monkeypatch):
    """A training and its first evaluation that both waited for the server come to it at the same moment."""
    train(make_config(run_dir), [1])
    senders = [Sender(tracking._destination(make_config(run_dir).tracking, run_dir)) for _ in range(2)]
    for sender in senders:
        monkeypatch.setattr(sender._client, "create_run", after_a_second(sender._client.create_run))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Sender.deliver, senders))
    assert only_run(client_of(database)).info.run_name == run_dir.name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_is_away_at_first_and_again_later_gets_every_point_once(
    database, run_dir, tmp_path, start_training, capfd
):
    port = free_port()
    values = {"uri": f"http://127.0.0.1:{port}"}
    config = make_config(run_dir, **values)
    with (tmp_path / "said.txt").open("w") as errors:
        training = start_training(run_dir, values, 1, 1_000_000, 0.1, errors)

        def said(text: str) -> int:
            return (tmp_path / "said.txt").read_text().count(text)

        wait_until(lambda: said("Connection refused; going on without") == 1)
        with mlflow_server(database, port):
            wait_until(lambda: said("answers again") == 1)
        wait_until(lambda: said("Connection refused; going on without") == 2)
        away_at = count_lines(run_dir)
        with mlflow_server(database, port):
            wait_until(lambda: said("answers again") == 2)
            assert max(step for _, step, _ in stored_points(database)) > away_at
            result = run_dir / "result.json"
            result.touch()
            log_evaluation(config, run_dir, 50, {"eval/fid": 12.5}, [result])
            assert only_run(client_of(database)).info.status == "RUNNING"
            sender_of(training).kill()
            training.kill()
            training.wait()
    assert len(list((database.parent / "served").rglob("evaluation/step-00000050/result.json"))) == 1

    last = count_lines(run_dir) - 1  # one line is the start's
    Sender(replace(tracking._destination(config.tracking, run_dir), uri=f"sqlite:///{database}")).deliver()
    assert stored_points(database) == sorted([("eval/fid", 50, 12.5), *expected_points(range(1, last + 1))])
