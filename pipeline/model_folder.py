"""A generator as a folder that `sagan.load` reads: config.json and model.safetensors, without spectral norm."""

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from pipeline.config import Config
from pipeline.manifest import ShardSet
from pipeline.networks import generator_arguments
from pipeline.shard_file import write_file
from sagan import portable


def write_folder(
    network: nn.Module, arguments: dict[str, Any], about: dict[str, Any], directory: Path, architecture: str
) -> nn.Module:
    """Writes config.json and model.safetensors into a folder and returns the generator that is in them.

    Args:
        network: a generator in eval mode, with spectral norm.
        arguments: of its class, without those for training.
        about: what else config.json tells.
        directory: there already.
        architecture: resnet or dcgan.
    """
    folded = portable.fold_spectral_norm(network).cpu().float()
    tensors = {name: tensor.detach().contiguous() for name, tensor in folded.state_dict().items()}
    # With this metadata other readers of safetensors know what wrote the file.
    write_file(directory / portable.WEIGHTS_NAME, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    sizes = {name: getattr(network, name) for name in ("resolution", "num_classes", "z_dim")}
    config = {"format": portable.FORMAT, "architecture": architecture, "arguments": arguments} | sizes | about
    write_file(directory / portable.CONFIG_NAME, (json.dumps(config, indent=1) + "\n").encode())
    return folded


def finished_step(run_dir: Path) -> int | None:
    """Returns the step of the generator in RUN/model; None when there is none."""
    try:
        return int(json.loads((run_dir / "model" / portable.CONFIG_NAME).read_text())["provenance"]["step"])
    except FileNotFoundError:
        return None


def write_finished(network: nn.Module, config: Config, shard_set: ShardSet, step: int) -> Path:
    """Leaves a finished run's averaged generator in RUN/model, whole or not at all: weights and config.json.

    Args:
        network: the average, in eval mode.
        config: of the run.
        shard_set: that it was trained on.
        step: updates done.
    """
    target = config.run_dir / "model"
    partial = target.with_name(".model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    manifest = shard_set.manifest
    provenance = {"run": config.run.name, "step": step, "weights": "ema", "dataset_id": shard_set.dataset_id}
    about = {
        "class_names": manifest.class_names,
        "class_titles": manifest.class_titles,
        "provenance": provenance,
    }
    write_folder(network, generator_arguments(config), about, partial, config.model.architecture)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target
