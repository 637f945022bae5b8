"""The folder that leaves the house: used where neither the run nor this program is, by torch and by an ONNX runtime."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import sagan
from launch import export
from pipeline import opened, results
from pipeline.config import config_from_dict, load_config, to_dict
from pipeline.networks import build_generator

# Finds nothing but the standard library and what torch and safetensors bring along.
_BLOCKER = """
import importlib.machinery, runpy, sys
allowed = {allowed!r} | set(sys.stdlib_module_names)
class Some(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        known = name.split(".")[0] in allowed or name.startswith("_sysconfigdata")
        return super().find_spec(name, path, target) if known else None
builtin, frozen = importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter
sys.meta_path[:] = [builtin, frozen, Some]
sys.path.insert(0, {folder!r})
sys.argv = ["sample.py", *{arguments!r}]
runpy.run_path({folder!r} + "/sample.py", run_name="__main__")
assert sys.modules["sagan"].__file__.startswith({folder!r})
assert not {{"numpy", "pydantic", "yaml", "PIL", "pipeline"}} & sys.modules.keys()
"""


@pytest.fixture(scope="module")
def exported(untrained_run, tmp_path_factory) -> Path:
    """An export of a conditional generator with all its parts."""
    run_dir = Path(shutil.copytree(untrained_run, tmp_path_factory.mktemp("run") / "tiny"))
    weights_sha256 = opened.open_generator(run_dir).weights_sha256
    protocol = {"num_images": 50, "extractor": "random-convolutions", "batch_norm": "running",
                "reference": {"num_images": 90, "dataset": "images", "split": "all"}}  # fmt: skip
    for sha256, fid in ((weights_sha256, 12.5), ("0" * 64, 99.75)):
        result = {"step": 3, "scores": {"fid_random": fid}, "not_official_because": ["random features"],
                  "protocol": protocol, "provenance": {"weights_sha256": sha256}}  # fmt: skip
        results.write(results.path_of(run_dir, "step-00000003", sha256, protocol), result)
    out = tmp_path_factory.mktemp("exports") / "tiny"
    assert export.main([str(run_dir), str(out)]) == 0
    return out


def source_images(run_dir: Path, z: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Images of the checkpoint itself, by the networks that trained it."""
    config = load_config(run_dir / "config.yaml")
    generator = build_generator(config)
    [path] = (run_dir / "checkpoints").glob("step-*")
    generator.load_state_dict(safetensors.torch.load_file(path / "ema.safetensors"))
    with torch.no_grad():
        return generator.eval()(z, labels)


def test_three_lines_sample_what_the_run_samples(exported, untrained_run):
    generator = sagan.load(exported)
    torch.manual_seed(1)
    z, labels = torch.randn(20, generator.z_dim), torch.randint(generator.num_classes, (20,))
    expected = source_images(untrained_run, z, labels)
    assert expected.std() > 0.01
    torch.testing.assert_close(generator(z, labels), expected, rtol=0, atol=1e-5)


def test_onnxruntime_makes_the_same_images_in_any_batch(exported, untrained_run):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])
    torch.manual_seed(2)
    for count in (1, 7):
        z, labels = torch.randn(count, 8), torch.randint(3, (count,))
        (images,) = session.run(None, {"z": z.numpy(), "labels": labels.numpy()})
        np.testing.assert_allclose(images, source_images(untrained_run, z, labels), rtol=0, atol=1e-4)


def test_the_folder_is_enough_with_torch_and_safetensors_alone(exported, untrained_run, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "elsewhere"))
    named = [re.match(r"[\w-]+", line)[0] for line in importlib.metadata.requires("torch") or ()]
    brought = {"torch", "torchgen", "safetensors", "sagan", "mpmath", "markupsafe"} | {
        name.replace("-", "_") for name in named
    }
    assert not brought & {"numpy", "PIL", "pydantic", "yaml", "pipeline"}
    arguments = ["--classes", "1", "triangle", "--columns", "3", "--seed", "5", "--out", str(tmp_path / "images.png")]
    script = _BLOCKER.format(allowed=brought, folder=str(folder), arguments=arguments)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "images.png") as image:
        found = np.asarray(image)
    assert found.shape == (2 * 16, 3 * 16, 3)
    z = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(5))
    rows = [source_images(untrained_run, z[row], torch.full((3,), label)) for row, label in enumerate((1, 2))]
    expected = ((torch.stack(rows) + 1) * 127.5).numpy()  # (rows, columns, 3, H, W)
    expected = expected.transpose(0, 3, 1, 4, 2).reshape(32, 48, 3)
    assert np.abs(found - expected).max() <= 0.5 + 1e-3


def test_the_card_has_front_matter_provenance_and_the_scores_of_these_weights(exported, untrained_run):
    card, config = (exported / "README.md").read_text(), json.loads((exported / "config.json").read_text())
    assert card.startswith("---\nlicense: mit\n") and card.count("\n---\n") == 1
    assert "| fid_random | 12.5000 |" in card and "99.75" not in card and "random features" in card
    assert config["provenance"]["weights_sha256"] == opened.open_generator(untrained_run).weights_sha256
    assert config["provenance"]["step"] == 3 and config["provenance"]["weights_sha256"] in card
    assert config["class_names"] == ["circle", "square", "triangle"]
    names = {path.name for path in exported.iterdir()}
    assert names == {"README.md", "LICENSE", "config.json", "model.safetensors", "model.onnx", "sample.py",
                     "samples.png", "sagan"}  # fmt: skip


def test_what_cannot_be_exported_is_said_before_anything_is_written(exported, untrained_run, tmp_path, capsys):
    assert export.main([str(untrained_run), str(exported)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert export.main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "holds none of config.yaml (a run)" in capsys.readouterr().err
    assert export.main([str(untrained_run), str(tmp_path / "out"), "--checkpoint", "7"]) == 1
    assert "no snapshot or checkpoint of step 7" in capsys.readouterr().err
    assert export.main([str(exported), str(tmp_path / "out")]) == 1
    assert "is an export already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_that_makes_other_images_is_not_left_behind(untrained_run, tmp_path, monkeypatch, capsys):
    from pipeline import export as library

    def load_another(directory):
        generator = sagan.load(directory)
        generator.linear.bias += 0.01
        return generator

    monkeypatch.setattr(library.portable, "load", load_another)
    assert export.main([str(untrained_run), str(tmp_path / "out"), "--no-onnx"]) == 1
    assert "makes other images than its source" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unconditional_generator_of_the_other_architecture(tmp_path, untrained_run):
    from pipeline.model_folder import write_folder
    from pipeline.networks import generator_arguments

    values = to_dict(load_config(untrained_run / "config.yaml"))
    values["model"] |= {"architecture": "dcgan", "resolution": 64, "num_classes": 0, "attention_resolution": 32}
    config = config_from_dict(values | {"model": values["model"] | {"g_channels": 8}}, "test")
    source = build_generator(config).eval()
    write_folder(source, generator_arguments(config), {}, tmp_path, "dcgan")
    z = torch.randn(2, 8)
    torch.testing.assert_close(sagan.load(tmp_path)(z), source(z), rtol=0, atol=1e-5)
