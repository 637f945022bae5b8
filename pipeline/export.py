"""A run's averaged generator as a folder that can leave the house: weights, card, ONNX and a script to sample it."""

import os
import shutil
import warnings
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sagan
from pipeline import results, sampling
from pipeline.model_folder import write_folder
from pipeline.networks import generator_arguments
from pipeline.noise import draw_z
from pipeline.opened import Opened
from pipeline.tracking import git_state
from sagan import portable

_MAX_DIFFERENCE, _MAX_ONNX_DIFFERENCE = 1e-5, 1e-4  # of images in [-1, 1]
_NUM_COMPARED = 8
_SAGAN = Path(sagan.__file__).parent


class ExportError(ValueError):
    """An export that cannot be made; the message says why and the way out."""


def export(opened: Opened, out: Path, *, onnx: bool) -> list[str]:
    """Writes a generator as a folder of its own, complete or not at all, and compares it with its source.

    Args:
        opened: from a run or checkpoint, on the CPU.
        out: the new folder.
        onnx: whether model.onnx is written too.

    Returns:
        What was found, as lines for people.

    Raises:
        ExportError: `out` is there, a package is missing, or the export makes other images than its source.
    """
    check(out, onnx)
    assert opened.config is not None
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        lines = _write(opened, partial, onnx)
        if out.is_dir():
            out.rmdir()  # empty, or it would have been refused
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return lines


def check(out: Path, onnx: bool) -> None:
    """Finds out before the work what would make it fail.

    Raises:
        ExportError: see `export`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} is there already; name a new folder, or remove it")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if onnx and missing:
        raise ExportError(
            f"ONNX needs {', '.join(missing)}: `pip install -e '.[export]'`, or leave it out with --no-onnx"
        )


def _write(opened: Opened, directory: Path, onnx: bool) -> list[str]:
    config = opened.config
    assert config is not None
    commit, dirty = git_state()
    provenance = {
        "run": config.run.name,
        "step": opened.step,
        "weights": opened.weights,
        "weights_sha256": opened.weights_sha256,
        "dataset_id": opened.dataset_id,
        "exported_by_commit": commit + ("+changes" if dirty else ""),
        "torch": torch.__version__,
    }
    names = {"class_names": opened.class_names, "class_titles": opened.class_titles}
    about = names | {"provenance": provenance}
    write_folder(opened.generator, generator_arguments(config), about, directory, config.model.architecture)
    exported = portable.load(directory)
    z, labels = _inputs(opened)
    expected, found = opened.generator(z, labels), exported(z, labels)
    lines = [_compare("model.safetensors", expected, found, _MAX_DIFFERENCE)]
    if onnx:
        _write_onnx(exported, directory / "model.onnx", z, labels)
        lines.append(
            _compare("model.onnx", expected, _run_onnx(directory / "model.onnx", z, labels), _MAX_ONNX_DIFFERENCE)
        )
    grid = sampling.sample_grid(exported, config.run.seed, opened.z_dim, opened.num_classes)
    sampling.save_png(grid, directory / "samples.png")
    shutil.copytree(_SAGAN, directory / "sagan", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(Path(__file__).with_name("export_sample.py"), directory / "sample.py")
    license_file = _SAGAN.parent / "LICENSE"
    if license_file.exists():
        shutil.copyfile(license_file, directory / "LICENSE")
    (directory / "README.md").write_text(_card(opened, provenance, lines, onnx))
    return lines


def _inputs(opened: Opened) -> tuple[Tensor, Tensor | None]:
    z = draw_z(0, "grid_z", 0, 0, _NUM_COMPARED, opened.z_dim)
    labels = torch.arange(_NUM_COMPARED) * max(1, opened.num_classes // _NUM_COMPARED) % max(1, opened.num_classes)
    return z, labels if opened.num_classes else None


def _compare(name: str, expected: Tensor, found: Tensor, limit: float) -> str:
    difference = float((expected - found).abs().max())
    if not difference <= limit:
        raise ExportError(
            f"{name} makes other images than its source: they differ by up to {difference:.2g}, more than {limit:g}; "
            "nothing was written"
        )
    return f"{name}: images differ from the training's by {difference:.1e} at most (of -1 to 1)"


def _write_onnx(generator: nn.Module, path: Path, z: Tensor, labels: Tensor | None) -> None:
    batch = torch.export.Dim("batch", min=1)
    inputs = {"z": z} if labels is None else {"z": z, "labels": labels}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own code and imports warn of what users cannot change
        program = torch.onnx.export(
            generator,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=["images"],
            dynamic_shapes={name: {0: batch} for name in inputs},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=False)


def _run_onnx(path: Path, z: Tensor, labels: Tensor | None) -> Tensor:
    import onnxruntime  # type: ignore[import-untyped]  # it comes without types

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs: dict[str, Any] = {"z": z.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
    halves = [{name: rows[part] for name, rows in inputs.items()} for part in (slice(0, 3), slice(3, None))]
    return torch.from_numpy(np.concatenate([session.run(["images"], half)[0] for half in halves]))


def _card(opened: Opened, provenance: dict[str, Any], comparisons: list[str], onnx: bool) -> str:
    """Returns the model card, with the front matter that model hubs read."""
    config = opened.config
    assert config is not None
    model, classes = config.model, opened.num_classes
    kind = f"class-conditional ({classes:,} classes)" if classes else "unconditional"
    attention = f"self-attention at {model.attention_resolution} px" if model.attention_resolution else "no attention"
    front = [
        "---",
        "license: mit",
        "library_name: pytorch",
        "pipeline_tag: unconditional-image-generation",
        "tags: [gan, sagan, image-generation]",
        "---",
    ]
    call = "generator(torch.randn(8, generator.z_dim), torch.randint(generator.num_classes, (8,)))"
    body = [
        "",
        f"# {config.run.name}: SAGAN, {model.resolution}x{model.resolution}, {kind}",
        "",
        "![samples](samples.png)",
        "",
        f"The averaged generator of a [Self-Attention GAN](https://arxiv.org/abs/1805.08318), {attention}, after "
        f"{opened.step:,} steps of {config.train.global_batch_size} images. Spectral norm is folded into the weights.",
        "",
        "## Use",
        "",
        "Needs `torch` and `safetensors`; `sagan/` in this folder is all the code.",
        "",
        "```python",
        "import sagan, torch",
        'generator = sagan.load(".")',
        f"images = {call if classes else 'generator(torch.randn(8, generator.z_dim))'}  # (8, 3, H, W) in [-1, 1]",
        "```",
        "",
        f"`python sample.py{' --classes 0 1' if classes else ''}` writes a grid as PNG. `config.json` has the "
        "class names, in the order of the labels." + (" `model.onnx` is the same for ONNX runtimes." if onnx else ""),
        "",
        "## Scores",
        "",
        *_score_lines(opened),
        "",
        "## Where it comes from",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | `{value}` |" for name, value in provenance.items()),
        f"| exported | {date.today().isoformat()} |",
        *(f"| checked | {line} |" for line in comparisons),
        "",
        "The images it was trained on have terms of their own, which may bind what is made of them.",
        "",
    ]
    return "\n".join(front + body)


def _score_lines(opened: Opened) -> list[str]:
    """Returns every evaluation of these very weights as a table."""
    assert opened.run_dir is not None
    found = [results.read(path) for path in results.published(opened.run_dir)]
    rows = [
        result
        for result in found
        if result.get("scores") and result.get("provenance", {}).get("weights_sha256") == opened.weights_sha256
    ]
    if not rows:
        return ["Not evaluated yet."]
    lines = []
    for result in rows:
        protocol, real = result["protocol"], result["protocol"]["reference"]
        lines += [
            f"{protocol['num_images']:,} samples against the {real['num_images']:,} images of {real['dataset']} "
            f"({real['split']}), features of {protocol['extractor']}, {protocol['batch_norm']} batch norm:",
            "",
            "| score | value |",
            "|---|---|",
            *(f"| {name} | {value:.4f} |" for name, value in result["scores"].items()),
            "",
            *(f"Not the official protocol: {reason}." for reason in result["not_official_because"]),
        ]
    return lines


def size_of(directory: Path) -> int:
    """Returns the bytes of a folder's files."""
    return sum(os.path.getsize(path) for path in directory.rglob("*") if path.is_file())
