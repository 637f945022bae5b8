import csv
import hashlib
import json
import shutil
import socket
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from launch import evaluate
from pipeline import (
    checkpoint,
    features,
    generated,
    intra_class,
    journal,
    real,
    results,
    shards,
    snapshots,
    sources,
    subject,
    tracking,
    truncation,
    watch,
)
from pipeline.checkpoint import TrainerState
from pipeline.config import config_from_dict, load_config, to_dict, to_yaml
from pipeline.manifest import open_shard_set
from pipeline.networks import build_generator

SMOKE = (
    "evaluation.features=random", "evaluation.num_images=40", "evaluation.batch_size=16",
    "evaluation.kid_subset_size=20",
)  # fmt: skip


@pytest.fixture
def shard_copy(tiny_shards, tmp_path) -> Path:
    """A set of our own to keep reference statistics in."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards", ignore=shutil.ignore_patterns("reference")))


@pytest.fixture
def run_dir(shard_copy, tmp_path) -> Path:
    """A run with a checkpoint at step 3."""
    return make_run(tmp_path / "runs" / "tiny", shard_copy)


def make_run(run_dir: Path, shard_dir: Path) -> Path:
    values = {
        "run": {"name": run_dir.name, "dir": str(run_dir.parent), "device": "cpu", "expected_world_size": 7},
        "data": {"shards": str(shard_dir), "num_workers": 0},
        "model": {"resolution": 16, "num_classes": 3, "z_dim": 8, "g_channels": 4, "d_channels": 4,
                  "attention_resolution": 8},
        "train": {"steps": 9, "global_batch_size": 6, "checkpoint_every_steps": 3},
        "tracking": {"enabled": False},
    }  # fmt: skip
    config = config_from_dict(values, "test")
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    save_checkpoint(run_dir, config, 3)
    return run_dir


def save_checkpoint(run_dir: Path, config, step: int) -> Path:
    torch.manual_seed(step)
    ema = build_generator(config).state_dict()
    dataset_id = open_shard_set(config.data.shards).dataset_id
    state = TrainerState(step, 6 * step, step, 1, dataset_id, 1, to_dict(config), {})
    networks = {"generator": ema, "discriminator": {"weight": torch.zeros(1)}, "ema": ema}
    return checkpoint.save(run_dir, state, networks, {"generator": {}, "discriminator": {}})


def launch(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    return evaluate.main()


def fails(monkeypatch, capsys, *arguments) -> str:
    """The message of an evaluation that must end before its first sample."""
    with patch.object(generated, "sample_block", side_effect=AssertionError("a sample was made")):
        assert launch(monkeypatch, *arguments) == 1
    return capsys.readouterr().err


def result_of(run_dir: Path) -> dict:
    [path] = (run_dir / "evaluations").rglob("*.json")
    return json.loads(path.read_text())


def test_a_smoke_run_leaves_a_result_that_says_how_it_came_about(run_dir, shard_copy, monkeypatch, capsys):
    assert launch(monkeypatch, run_dir, *SMOKE) == 0
    result, shown = result_of(run_dir), capsys.readouterr().out
    assert set(result["scores"]) == {
        "fid_random_features", "inception_score_mean_random_features", "inception_score_std_random_features",
        "inception_score_single_split_random_features", "kid_mean_random_features", "kid_std_random_features",
        "precision_random_features", "recall_random_features",
    }  # fmt: skip
    for name, score in result["scores"].items():
        assert np.isfinite(score)
        assert f"{name} " in shown
    assert result["step"] == 3
    assert result["protocol"]["num_images"] == 40
    assert result["protocol"]["reference"]["num_images"] == 90
    assert len(result["not_official_because"]) == 2
    provenance = result["provenance"]
    ema = run_dir / "checkpoints" / "step-00000003" / "ema.safetensors"
    assert provenance["weights_sha256"] == json.loads((ema.parent / "manifest.json").read_text())["sha256"][ema.name]
    [reference] = (shard_copy / "reference").iterdir()
    assert provenance["reference_file"] == str(reference)
    assert provenance["world_size"] == 1
    assert provenance["tf32"] == {"matmul": False, "convolution": False}


def test_the_same_command_again_shows_the_result_and_makes_nothing(run_dir, monkeypatch, capsys):
    assert launch(monkeypatch, run_dir, *SMOKE) == 0
    first, [path] = capsys.readouterr(), (run_dir / "evaluations").rglob("*.json")
    before = path.stat().st_mtime_ns
    with patch.object(generated, "sample_block", side_effect=AssertionError("a sample was made")):
        assert launch(monkeypatch, run_dir, *SMOKE) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert "is there already" in again.err
    assert path.stat().st_mtime_ns == before


def test_other_weights_and_other_protocols_have_results_of_their_own(run_dir, monkeypatch):
    assert launch(monkeypatch, run_dir, *SMOKE) == 0
    assert launch(monkeypatch, run_dir, *SMOKE, "evaluation.seed=1") == 0
    save_checkpoint(run_dir, evaluate._read_config(run_dir, []), 6)
    assert launch(monkeypatch, run_dir, *SMOKE) == 0
    steps = sorted(path.parent.name for path in (run_dir / "evaluations").rglob("*.json"))
    assert steps == ["step-00000003", "step-00000003", "step-00000006"]


def test_mlflow_is_told_the_scores_at_the_training_step(run_dir, monkeypatch):
    told = []
    monkeypatch.setattr(tracking, "log_evaluation", lambda _, told_dir, **what: told.append((told_dir, what)))
    assert launch(monkeypatch, run_dir, *SMOKE) == 0
    [(told_dir, what)] = told
    assert (told_dir, what["step"]) == (run_dir, 3)
    result = json.loads(what["files"][0].read_text())
    assert what["weights"] == result["provenance"]["weights_sha256"]
    assert what["metrics"] == {f"eval/{name}": score for name, score in result["scores"].items()}


def test_a_damaged_newest_checkpoint_is_passed_over_and_left_alone(run_dir, monkeypatch, capsys):
    damaged = save_checkpoint(run_dir, evaluate._read_config(run_dir, []), 6)
    (damaged / "ema.safetensors").write_bytes(b"half")
    before = sorted((run_dir / "checkpoints").rglob("*"))
    assert launch(monkeypatch, run_dir, *SMOKE) == 0
    assert "step-00000006 is damaged (ema.safetensors" in capsys.readouterr().err
    assert result_of(run_dir)["step"] == 3
    assert sorted((run_dir / "checkpoints").rglob("*")) == before


def test_a_directory_that_is_no_run(tmp_path, monkeypatch, capsys):
    assert "holds no config.yaml" in fails(monkeypatch, capsys, tmp_path)


def test_a_run_without_a_checkpoint_yet(run_dir, monkeypatch, capsys):
    shutil.rmtree(run_dir / "checkpoints")
    message = fails(monkeypatch, capsys, run_dir, *SMOKE)
    assert "holds no checkpoint yet" in message
    assert "every 3 steps (train.checkpoint_every_steps)" in message


def test_only_what_belongs_to_an_evaluation_can_be_given(run_dir, monkeypatch, capsys):
    message = fails(monkeypatch, capsys, run_dir, "model.z_dim=9")
    assert "'model.z_dim=9': an evaluation takes the run as it was trained" in message


def test_a_mistyped_key_is_named(run_dir, monkeypatch, capsys):
    message = fails(monkeypatch, capsys, run_dir, "evaluation.num_image=9")
    assert "evaluation.num_image: unknown key; did you mean evaluation.num_images?" in message


def test_a_config_that_was_edited_after_training_is_refused(run_dir, monkeypatch, capsys):
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("batch_norm_eps: 1.0e-05", "batch_norm_eps: 1.0e-04"))
    assert "model.batch_norm_eps: 1e-05 -> 0.0001" in fails(monkeypatch, capsys, run_dir, *SMOKE)


def test_a_step_from_before_an_accepted_change_can_be_scored(run_dir, monkeypatch):
    path = run_dir / "config.yaml"
    assert "lr_g: 0.0001" in path.read_text()
    path.write_text(path.read_text().replace("lr_g: 0.0001", "lr_g: 0.0002"))
    assert launch(monkeypatch, run_dir, *SMOKE) == 0


def test_a_step_that_does_not_fit_ends_neither_all_nor_a_watch(run_dir, monkeypatch, capsys):
    old = load_config(run_dir / "config.yaml")
    save_checkpoint(run_dir, replace(old, model=replace(old.model, batch_norm_eps=1e-4)), 6)
    save_checkpoint(run_dir, old, 9)
    assert launch(monkeypatch, run_dir, *SMOKE, "--checkpoint", "all") == 1
    assert "model.batch_norm_eps: 0.0001 -> 1e-05" in capsys.readouterr().err
    assert [results.read(path)["step"] for path in results.published(run_dir)] == [3, 9]


@pytest.mark.parametrize("what", [["--sync"], ["--checkpoint", "best"], []])
def test_a_damaged_result_is_named_with_the_way_out(run_dir, what, monkeypatch, capsys):
    assert launch(monkeypatch, run_dir, *SMOKE) == 0
    [path] = results.published(run_dir)
    path.write_text("{")
    assert launch(monkeypatch, run_dir, *SMOKE, *what) == 1
    assert f"error: {path} is no result file" in capsys.readouterr().err


def other_set(tiny_shards: Path, destination: Path, size: int) -> Path:
    destination.mkdir()
    shards.build(shards.plan(sources.list_source(tiny_shards.parent / "images"), image_size=size, seed=1), destination)
    return destination


def test_a_reference_of_another_size(run_dir, tiny_shards, tmp_path, monkeypatch, capsys):
    other = other_set(tiny_shards, tmp_path / "large", 32)
    message = fails(monkeypatch, capsys, run_dir, *SMOKE, f"data.shards={other}")
    assert "holds images of 32 px, but the generator makes 16 px" in message


def test_a_reference_that_is_not_the_training_set(run_dir, tiny_shards, tmp_path, monkeypatch, capsys):
    other = other_set(tiny_shards, tmp_path / "other", 16)
    message = fails(monkeypatch, capsys, run_dir, *SMOKE, f"data.shards={other}")
    assert f"was trained on {open_shard_set(str(tiny_shards)).dataset_id[:12]}" in message
    assert "say where it is with data.shards=DIR" in message


def test_a_training_set_that_was_moved(run_dir, shard_copy, tmp_path, monkeypatch):
    moved = shard_copy.rename(tmp_path / "moved")
    assert launch(monkeypatch, run_dir, *SMOKE, f"data.shards={moved}") == 0


def test_without_weights_the_message_comes_before_any_sample(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(features, "WEIGHTS_URL", (tmp_path / "absent.pth").as_uri())
    message = fails(monkeypatch, capsys, run_dir, "evaluation.kid_subset_size=20")
    assert str(tmp_path / "hub" / "hub" / "checkpoints") in message
    assert "evaluation.inception_weights=PATH" in message


def test_weights_of_a_wrong_hash(run_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "weights.pth").write_bytes(b"something else")
    weights = f"evaluation.inception_weights={tmp_path / 'weights.pth'}"
    message = fails(monkeypatch, capsys, run_dir, weights, "evaluation.kid_subset_size=20")
    assert "that of the published Inception weights begins with 6726825d" in message


def test_another_number_of_processes_than_asked_for(run_dir, monkeypatch, capsys):
    """The training's own run.expected_world_size, 7 here, is not meant; one on the command line is."""
    message = fails(monkeypatch, capsys, run_dir, *SMOKE, "run.expected_world_size=2")
    assert "run.expected_world_size is 2, but 1 process(es) started" in message


def save_snapshot(run_dir: Path, config, step: int, **changes) -> Path:
    """A snapshot of seeded weights; `changes` are filled into all their values."""
    torch.manual_seed(100 + step)
    ema = build_generator(config).state_dict()
    if "fill" in changes:
        ema = {
            name: value.fill_(changes["fill"]) if value.is_floating_point() else value for name, value in ema.items()
        }
    dataset_id = open_shard_set(config.data.shards).dataset_id
    torch.manual_seed(200 + step)
    networks = {"ema": ema, "generator": build_generator(config).state_dict()}
    state = TrainerState(step, 6 * step, step, 1, dataset_id, 1, to_dict(config), {})
    return snapshots.save(run_dir, state, networks)


def scored_steps(run_dir: Path) -> list[int]:
    return sorted(json.loads(path.read_text())["step"] for path in (run_dir / "evaluations").rglob("*.json"))


@pytest.fixture
def run_of_snapshots(run_dir) -> Path:
    """A checkpoint at step 3, snapshots at 2, 4 and 6."""
    for step in (2, 4, 6):
        save_snapshot(run_dir, evaluate._read_config(run_dir, []), step)
    return run_dir


@pytest.mark.parametrize(("which", "steps"), [("newest", [6]), ("all", [2, 3, 4, 6]), ("4", [4]), ("3", [3])])
def test_what_is_scored_can_be_chosen(run_of_snapshots, monkeypatch, which, steps):
    assert launch(monkeypatch, run_of_snapshots, "--checkpoint", which, *SMOKE) == 0
    assert scored_steps(run_of_snapshots) == steps


def test_the_best_is_that_of_the_lowest_fid(run_of_snapshots, monkeypatch, capsys):
    assert "holds no FID yet" in fails(monkeypatch, capsys, run_of_snapshots, "--checkpoint", "best", *SMOKE)
    assert launch(monkeypatch, run_of_snapshots, "--checkpoint", "all", *SMOKE) == 0
    found = [json.loads(path.read_text()) for path in (run_of_snapshots / "evaluations").rglob("*.json")]
    best = min(found, key=lambda result: result["scores"]["fid_random_features"])["step"]
    assert launch(monkeypatch, run_of_snapshots, "--checkpoint", "best", *SMOKE, "evaluation.seed=1") == 0
    [again] = [
        result
        for path in (run_of_snapshots / "evaluations").rglob("*.json")
        if (result := json.loads(path.read_text()))["protocol"]["seed"] == 1
    ]
    assert again["step"] == best


def test_a_step_that_is_not_there(run_of_snapshots, monkeypatch, capsys):
    message = fails(monkeypatch, capsys, run_of_snapshots, "--checkpoint", "5", *SMOKE)
    assert "the steps there are 2, 3, 4, 6" in message


def test_raw_weights_have_a_result_and_names_of_their_own(run_of_snapshots, monkeypatch):
    assert launch(monkeypatch, run_of_snapshots, *SMOKE, "evaluation.weights=raw") == 0
    result = result_of(run_of_snapshots)
    assert "fid_random_features_raw" in result["scores"]
    raw = run_of_snapshots / "snapshots" / "step-00000006" / "generator.safetensors"
    assert result["provenance"]["weights_sha256"] == hashlib.sha256(raw.read_bytes()).hexdigest()


def test_broken_weights_are_on_record_and_stop_no_others(run_of_snapshots, monkeypatch, capsys):
    save_snapshot(run_of_snapshots, evaluate._read_config(run_of_snapshots, []), 8, fill=float("nan"))
    assert launch(monkeypatch, run_of_snapshots, "--checkpoint", "all", *SMOKE) == 1
    assert "16 of 16 hold non-finite values" in capsys.readouterr().err
    assert scored_steps(run_of_snapshots) == [2, 3, 4, 6, 8]
    with patch.object(generated, "sample_block", side_effect=AssertionError("a sample was made")):
        assert "hold non-finite values" in fails(monkeypatch, capsys, run_of_snapshots, *SMOKE)


def test_a_generator_of_constant_images(run_dir, monkeypatch, capsys):
    paint_grey = patch.object(generated, "build_generator", return_value=Grey())
    with paint_grey, patch.object(Grey, "load_state_dict"):
        assert launch(monkeypatch, run_dir, *SMOKE) == 1
    assert "are of a single colour: the generator has collapsed" in capsys.readouterr().err


class Grey(nn.Module):
    def forward(self, z, labels):
        return torch.zeros(len(z), 3, 16, 16)


def test_watching_scores_each_snapshot_once_and_ends_with_the_training(run_of_snapshots, monkeypatch):
    """Snapshots come while it watches; the last one together with DONE."""
    config, made = evaluate._read_config(run_of_snapshots, []), []

    def training_goes_on(seconds):
        step = 8 + len(made)
        made.append(save_snapshot(run_of_snapshots, config, step))
        (run_of_snapshots / "DONE").write_text(f"{step}\n")  # 8 is less than train.steps, 9 is not

    clock = SimpleNamespace(sleep=training_goes_on, perf_counter=time.perf_counter)
    monkeypatch.setattr(watch, "time", clock)
    make_samples = generated.make_samples
    with patch.object(generated, "make_samples", side_effect=make_samples) as counted:
        assert launch(monkeypatch, run_of_snapshots, "--watch", *SMOKE) == 0
    assert scored_steps(run_of_snapshots) == [2, 4, 6, 8, 9]
    assert counted.call_count == 5
    with patch.object(generated, "sample_block", side_effect=AssertionError("a sample was made")):
        assert launch(monkeypatch, run_of_snapshots, "--watch", *SMOKE) == 0


def test_watching_until_a_step(run_of_snapshots, monkeypatch):
    assert launch(monkeypatch, run_of_snapshots, "--watch", "--until-step", 4, *SMOKE) == 0
    assert scored_steps(run_of_snapshots) == [2, 4]


def test_what_is_pruned_meanwhile_is_passed_over(run_of_snapshots, monkeypatch, capsys):
    read = subject.read

    def prune_and_read(path, *arguments):
        if checkpoint.step_of(path) == 3:
            shutil.rmtree(path)
        return read(path, *arguments)

    monkeypatch.setattr(subject, "read", prune_and_read)
    assert launch(monkeypatch, run_of_snapshots, "--checkpoint", "all", *SMOKE) == 0
    assert "passed over: " in capsys.readouterr().err
    assert scored_steps(run_of_snapshots) == [2, 4, 6]


def test_a_snapshot_that_was_replaced_is_scored_again(run_of_snapshots, monkeypatch):
    """As after a rollback, whose steps draw other noise."""
    config = evaluate._read_config(run_of_snapshots, [])
    assert launch(monkeypatch, run_of_snapshots, "--watch", "--until-step", 4, *SMOKE) == 0
    save_snapshot(run_of_snapshots, config, 4, fill=0.01)
    launch(monkeypatch, run_of_snapshots, "--watch", "--until-step", 4, *SMOKE)
    assert scored_steps(run_of_snapshots) == [2, 4, 4]


def test_weights_that_were_given_up_are_neither_the_best_nor_told(run_of_snapshots, monkeypatch, capsys):
    """Step 4 was scored, then the run went back and made it anew."""
    config = evaluate._read_config(run_of_snapshots, [])
    assert launch(monkeypatch, run_of_snapshots, "--checkpoint", "4", *SMOKE) == 0
    save_snapshot(run_of_snapshots, config, 4, fill=0.01)
    assert "holds no FID yet of the snapshots" in fails(
        monkeypatch, capsys, run_of_snapshots, "--checkpoint", "best", *SMOKE
    )
    shutil.rmtree(run_of_snapshots / "journals")
    assert launch(monkeypatch, run_of_snapshots, "--sync") == 0
    assert not list((run_of_snapshots / "journals").glob("*"))


@pytest.mark.parametrize("made_anew", [False, True])
def test_weights_that_are_given_up_while_they_are_scored_are_not_told(run_of_snapshots, monkeypatch, capsys, made_anew):
    """A rollback takes the snapshot away, and training may have left another one since."""
    config, write = evaluate._read_config(run_of_snapshots, []), results.write

    def roll_back_and_write(path, result):
        snapshots.remove_after(run_of_snapshots, 4)
        if made_anew:
            save_snapshot(run_of_snapshots, config, 6, fill=0.01)
        write(path, result)

    monkeypatch.setattr(results, "write", roll_back_and_write)
    assert launch(monkeypatch, run_of_snapshots, "--checkpoint", "6", *SMOKE) == 0
    assert "they are not told to MLflow" in capsys.readouterr().err
    assert not (run_of_snapshots / "journals").exists()


def test_results_are_sent_later_when_asked(run_of_snapshots, monkeypatch, capsys):
    """The result that a kill left untold is told too."""
    with patch.object(tracking, "log_evaluation"):
        assert launch(monkeypatch, run_of_snapshots, "--checkpoint", "all", *SMOKE) == 0
    assert launch(monkeypatch, run_of_snapshots, "--sync", "tracking.enabled=false") == 0
    assert "4 results" in capsys.readouterr().out
    records = [
        record
        for path in (run_of_snapshots / "journals").glob("evaluation-*.jsonl")
        for record in journal.read_records(path)[0]
    ]
    assert sorted(record["step"] for record in records) == [2, 3, 4, 6]


@pytest.mark.slow  # starts MLflow senders
@pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")  # of what MLflow imports
def test_after_an_outage_sync_tells_each_result_once_at_its_step(run_of_snapshots, monkeypatch, capfd):
    """No server answers the evaluation; later the runs' own database takes what it could not tell."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        away = f"tracking.uri=http://127.0.0.1:{listener.getsockname()[1]}"
    for step in (4, 6):
        with patch.object(tracking, "send_unsent") if step == 4 else nullcontext():
            assert (
                launch(monkeypatch, run_of_snapshots, "--checkpoint", step, *SMOKE, "tracking.enabled=true", away) == 0
            )
    assert "Connection refused; going on without" in capfd.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for _ in range(2):
        assert launch(monkeypatch, run_of_snapshots, "--sync", "tracking.enabled=true") == 0
        assert "2 results" in (said := capfd.readouterr().out) and "0 points and 0 files are not sent yet" in said
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{run_of_snapshots.parent / 'mlflow.db'}")
    [run] = [run for item in client.search_experiments() for run in client.search_runs([item.experiment_id])]
    history = client.get_metric_history(run.info.run_id, "eval/fid_random_features")
    assert [point.step for point in history] == [4, 6]
    assert len(client.list_artifacts(run.info.run_id, "evaluation/step-00000006")) == 1


def test_the_truncation_curve_has_a_table_and_a_plot(run_dir, monkeypatch, capsys):
    assert launch(monkeypatch, run_dir, *SMOKE, "evaluation.truncations=[0.5,2.0]") == 0
    curve = result_of(run_dir)["truncation_curve"]
    assert [list(point) for point in curve] == 2 * [
        ["truncation", "fid_random_features", "inception_score_mean_random_features"]
    ]
    assert [point["truncation"] for point in curve] == [0.5, 2.0]
    assert all(np.isfinite(list(point.values())).all() for point in curve)
    [plot] = (run_dir / "evaluations").rglob("*-truncation.png")
    with Image.open(plot) as image:
        assert image.width > 400
    assert "truncation 0.5" in capsys.readouterr().out


def test_each_class_has_a_score_of_its_own(run_dir, monkeypatch):
    assert launch(monkeypatch, run_dir, *SMOKE, "evaluation.intra_class_images=10") == 0
    [table] = (run_dir / "evaluations").rglob("*-classes.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {(row["name"], row["num_real"]) for row in rows} == {("circle", "30"), ("square", "30"), ("triangle", "30")}
    mean = np.mean([float(row["fid"]) for row in rows])
    assert result_of(run_dir)["scores"]["intra_fid_random_features_10"] == pytest.approx(mean, rel=1e-5)


def test_what_fails_beside_the_scores_is_named_and_they_stay(run_dir, monkeypatch, capsys):
    """The generator collapses at one truncation and in one class."""
    make_samples, usable = generated.make_samples, generated.usable

    def collapse_at_2(generator, config, extractor, world, threshold):
        if threshold == 2:
            raise generated.UnusableSamplesError("collapsed at 2")
        return make_samples(generator, config, extractor, world, threshold)

    def collapse_in_class_1(images, where):
        if where.endswith("class 1"):
            raise generated.UnusableSamplesError(f"{where} collapsed")
        return usable(images, where)

    monkeypatch.setattr(truncation, "make_samples", collapse_at_2)
    monkeypatch.setattr(intra_class, "usable", collapse_in_class_1)
    extras = ("evaluation.truncations=[0.5,2.0]", "evaluation.intra_class_images=10")
    assert launch(monkeypatch, run_dir, *SMOKE, *extras) == 1
    result, said = result_of(run_dir), capsys.readouterr()
    assert np.isfinite(result["scores"]["fid_random_features"])
    assert not [name for name in result["scores"] if name.startswith("intra_fid")]
    assert result["not_scored"] == [
        "truncation 2: collapsed at 2",
        "intra-class FID: 1 of 3 classes, the first: samples 0 to 9 of class 1 collapsed",
    ]
    assert all(f"not scored: {failure}" in said.out and failure in said.err for failure in result["not_scored"])
    assert len(list((run_dir / "evaluations").rglob("*-truncation.png"))) == 1
    [table] = (run_dir / "evaluations").rglob("*-classes.csv")
    assert [row["fid"] == "" for row in csv.DictReader(table.read_text().splitlines())] == [True, False, False]


def test_features_that_are_not_finite(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(
        features.RandomFeatures, "forward", lambda self, images: (images.flatten(1)[:, :64] / 0.0, None)
    )
    assert launch(monkeypatch, run_dir, *SMOKE) == 1
    assert "random-convolutions makes non-finite features of reference statistics" in capsys.readouterr().err


def test_real_images_are_scored_by_the_same_path(run_dir, shard_copy, monkeypatch, capsys):
    """The training set against itself: FID is 0, nothing is outside the manifold."""
    assert "evaluation.validation_shards=DIR" in fails(monkeypatch, capsys, run_dir, "--real", *SMOKE)
    arguments = (*SMOKE, "evaluation.num_images=90", f"evaluation.validation_shards={shard_copy}")
    assert launch(monkeypatch, run_dir, "--real", *arguments) == 0
    [path] = (run_dir / "evaluations" / "real").glob("*.json")
    scores = json.loads(path.read_text())["scores"]
    assert scores["real_fid_random_features"] == pytest.approx(0, abs=1e-4)
    assert scores["real_precision_random_features"] == scores["real_recall_random_features"] == 1


def test_part_of_a_larger_real_set_is_each_image_at_most_once(run_dir, shard_copy, monkeypatch):
    batches = [real._batch(block, 16, 40, block * 50 // 3) for block in range(3)]
    taken = [number for batch in batches for number in batch]
    assert len(set(taken)) == 40
    assert max(taken) < 90
    assert launch(monkeypatch, run_dir, "--real", *SMOKE, f"evaluation.validation_shards={shard_copy}") == 0


def test_a_validation_split_and_a_foreign_file_give_one_more_fid_each(run_dir, shard_copy, monkeypatch, capsys):
    assert launch(monkeypatch, run_dir, *SMOKE) == 0
    [ours] = (shard_copy / "reference").glob("*.npz")
    with np.load(ours) as file:
        np.savez(run_dir.parent / "foreign.npz", mu=file["mu"].astype(np.float32), sigma=file["sigma"])
    arguments = (
        f"evaluation.validation_shards={shard_copy}",
        f"evaluation.reference_file={run_dir.parent}/foreign.npz",
    )
    shutil.rmtree(run_dir / "evaluations")
    assert launch(monkeypatch, run_dir, *SMOKE, *arguments) == 0
    result = result_of(run_dir)
    fid = result["scores"]["fid_random_features"]
    assert result["scores"]["fid_validation_random_features"] == fid
    assert result["scores"]["fid_foreign_reference_random_features"] == pytest.approx(fid, rel=1e-4)
    assert any("does not say how it was made" in remark for remark in result["remarks"])


def test_too_few_images_for_kid(run_dir, monkeypatch, capsys):
    message = fails(monkeypatch, capsys, run_dir, *SMOKE, "evaluation.kid_subset_size=41")
    assert "there are only 40 samples" in message


def test_check_says_what_is_ready_and_changes_nothing(run_dir, monkeypatch, capsys):
    before = sorted(run_dir.rglob("*"))
    assert launch(monkeypatch, run_dir, "--check", *SMOKE) == 0
    out = capsys.readouterr().out
    for name in ("shards", "extractor", "reference", "generator", "memory", "disk", "device"):
        assert f"ok   {name}: " in out
    assert out.endswith("ready\n")
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_check_on_a_machine_without_the_gpu_and_the_server_warns(run_dir, monkeypatch, capsys):
    away = ["tracking.enabled=true", "tracking.uri=http://127.0.0.1:9"]
    assert launch(monkeypatch, run_dir, "--check", *SMOKE, "run.device=cuda", *away) == 0
    out = capsys.readouterr().out
    assert "warn device: run.device is cuda, but torch sees no CUDA device here" in out
    assert "warn tracking: http://127.0.0.1:9 (tracking.uri) does not answer" in out
    assert out.endswith("ready\n")


def test_check_names_every_fault_at_once(run_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "weights.pth").write_bytes(b"something else")
    (run_dir / "checkpoints" / "step-00000003" / "ema.safetensors").write_bytes(b"half")
    weights = f"evaluation.inception_weights={tmp_path / 'weights.pth'}"
    assert launch(monkeypatch, run_dir, "--check", weights, "evaluation.kid_subset_size=20") == 1
    out = capsys.readouterr().out
    assert "FAIL extractor: " in out
    assert "FAIL generator: " in out
    assert "ok   shards: " in out


@pytest.mark.parametrize(
    "arguments",
    [["--until-step", 5], ["--watch", "--checkpoint", "best"], ["--watch", "--real"], ["--checkpoint", "x"]],
)
def test_flags_that_do_not_go_together(run_dir, monkeypatch, arguments):
    with pytest.raises(SystemExit):
        launch(monkeypatch, run_dir, *arguments)
