import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from launch import evaluate
from pipeline import checkpoint, evaluation, features, shards, sources
from pipeline.checkpoint import TrainerState
from pipeline.config import config_from_dict, to_dict, to_yaml
from pipeline.manifest import open_shard_set
from pipeline.networks import build_generator

SMOKE = ("evaluation.features=random", "evaluation.num_images=40", "evaluation.batch_size=16")


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
    with patch.object(evaluation, "sample_block", side_effect=AssertionError("a sample was made")):
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
        "inception_score_single_split_random_features",
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
    assert provenance["ema_sha256"] == json.loads((ema.parent / "manifest.json").read_text())["sha256"][ema.name]
    [reference] = (shard_copy / "reference").iterdir()
    assert provenance["reference_file"] == str(reference)
    assert provenance["world_size"] == 1
    assert provenance["tf32"] == {"matmul": False, "convolution": False}


def test_the_same_command_again_shows_the_result_and_makes_nothing(run_dir, monkeypatch, capsys):
    assert launch(monkeypatch, run_dir, *SMOKE) == 0
    first, [path] = capsys.readouterr(), (run_dir / "evaluations").rglob("*.json")
    before = path.stat().st_mtime_ns
    with patch.object(evaluation, "sample_block", side_effect=AssertionError("a sample was made")):
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
    monkeypatch.setattr(evaluation.tracking, "log_evaluation", lambda *arguments: told.append(arguments))
    assert launch(monkeypatch, run_dir, *SMOKE) == 0
    [(config, told_dir, step, metrics, [path])] = told
    assert (config.run.name, told_dir, step) == ("tiny", run_dir, 3)
    result = json.loads(path.read_text())
    assert metrics == {f"eval/{name}": score for name, score in result["scores"].items()}


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
    message = fails(monkeypatch, capsys, run_dir)
    assert str(tmp_path / "hub" / "hub" / "checkpoints") in message
    assert "evaluation.inception_weights=PATH" in message


def test_weights_of_a_wrong_hash(run_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "weights.pth").write_bytes(b"something else")
    message = fails(monkeypatch, capsys, run_dir, f"evaluation.inception_weights={tmp_path / 'weights.pth'}")
    assert "that of the published Inception weights begins with 6726825d" in message


def test_another_number_of_processes_than_asked_for(run_dir, monkeypatch, capsys):
    """The training's own run.expected_world_size, 7 here, is not meant; one on the command line is."""
    message = fails(monkeypatch, capsys, run_dir, *SMOKE, "run.expected_world_size=2")
    assert "run.expected_world_size is 2, but 1 process(es) started" in message


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.images[number]


def random_inception_weights(path: Path, images: torch.Tensor) -> None:
    """Writes a file of Inception's shape with seeded random values, its batch norm calibrated on some images."""
    kind = torch_fidelity.FeatureExtractorInceptionV3
    with patch.object(kind, "load_state_dict"), patch.object(torch, "load"):
        network = kind("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path="none")
    generator = torch.Generator().manual_seed(20240601)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data = 1 + 0.1 * torch.randn(module.weight.shape, generator=generator)
            module.bias.data = 0.3 * torch.randn(module.bias.shape, generator=generator)
            module.reset_running_stats()
            module.momentum = None
            module.train()
        elif isinstance(module, nn.Linear):
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * 0.08
    with torch.no_grad():
        network(images)
    torch.save(network.eval().state_dict(), path)


@pytest.mark.slow  # Inception on a CPU, three times
@pytest.mark.timeout(1200)
def test_scores_are_those_of_calculate_metrics_with_1_and_2_processes(tiny_shards, tmp_path, repo_root, monkeypatch):
    shard_dir = tmp_path / "shards"
    shard_dir.mkdir()
    source = sources.list_source(tiny_shards.parent / "images")
    shards.build(shards.plan(source, image_size=16, limit_per_class=8), shard_dir)
    with tarfile.open(shard_dir / "shard-000000.tar") as shard:
        files = [shard.extractfile(member).read() for member in shard if member.name.endswith(".webp")]
    reals = torch.stack([torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1) for data in files])
    assert reals.shape == (24, 3, 16, 16)
    weights = tmp_path / "weights.pth"
    random_inception_weights(weights, reals)
    arguments = (
        "evaluation.num_images=20", "evaluation.batch_size=8", "evaluation.allow_unofficial_weights=true",
        f"evaluation.inception_weights={weights}",
    )  # fmt: skip

    alone = make_run(tmp_path / "runs" / "alone", shard_dir)
    config = evaluate._read_config(alone, list(arguments))
    generator = evaluation._generator(evaluation.find_subject(alone, config), config, torch.device("cpu"))
    fakes = torch.cat([evaluation.sample_block(generator, config, block, torch.device("cpu")) for block in range(3)])
    expected = torch_fidelity.calculate_metrics(
        input1=Images(fakes), input2=Images(reals), isc=True, fid=True, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights), cuda=False, cache=False, save_cpu_ram=True, verbose=False,
        batch_size=20,
    )  # fmt: skip

    assert launch(monkeypatch, alone, *arguments) == 0
    shutil.rmtree(shard_dir / "reference")
    together = make_run(tmp_path / "runs" / "together", shard_dir)
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", "configs/accelerate/cpu_two_processes.yaml"]
    subprocess.run([*launcher, "launch/evaluate.py", together, *arguments], cwd=repo_root, check=True)
    for run_dir, world_size in ((alone, 1), (together, 2)):
        result = result_of(run_dir)
        assert result["provenance"]["world_size"] == world_size
        found = {name.removesuffix("_unofficial"): score for name, score in result["scores"].items()}
        assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
        mean = expected["inception_score_mean"]
        assert found["inception_score_mean"] == pytest.approx(mean, rel=1e-6)
        assert found["inception_score_std"] == pytest.approx(expected["inception_score_std"], abs=1e-6 * mean)
