"""A generator from wherever it lies: a run, a checkpoint or snapshot of one, or an exported folder."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from pipeline import checkpoint, subject
from pipeline.config import Config, config_from_dict, load_config
from pipeline.features import EvaluationError
from pipeline.manifest import ShardSetError, open_shard_set
from pipeline.networks import build_discriminator
from sagan.portable import CONFIG_NAME, WEIGHTS_NAME, load, read_config


class OpenError(ValueError):
    """A place that holds no generator that can be used; the message says what was found and the way out."""


@dataclass(frozen=True)
class Opened:
    """A generator with all that is known about it."""

    path: Path  # of the checkpoint, snapshot or export
    step: int
    weights: str  # ema or raw
    weights_sha256: str  # of its file
    config: Config | None  # of the run; None: an export, which has none
    dataset_id: str  # that it was trained on
    generator: nn.Module  # float32, eval mode, no gradients
    z_dim: int
    num_classes: int  # 0: unconditional
    resolution: int
    class_names: tuple[str, ...]  # the folders' names; empty if unconditional or unknown
    class_titles: tuple[str, ...]  # what a person calls them; empty if unknown
    remarks: tuple[str, ...]  # what could not be found out, for people

    @property
    def run_dir(self) -> Path | None:
        """The run it lies in; None for an export, and for a checkpoint that was copied elsewhere."""
        run_dir = self.path.parent.parent
        return run_dir if self.config and (run_dir / "config.yaml").is_file() else None

    def title(self, label: int) -> str:
        """Returns what a person calls a class."""
        names = self.class_titles or self.class_names
        return names[label].split(",")[0] if names else f"class {label}"


def open_generator(
    where: Path, which: str = "newest", weights: str = "ema", device: torch.device | None = None
) -> Opened:
    """Opens a generator.

    Args:
        where: a run's directory, a checkpoint or snapshot in one, or what `launch/export.py` wrote.
        which: of a run: newest, best or a step; see `subject.choose`.
        weights: ema, or raw, the trained weights themselves.
        device: where it will be; None: the CPU.

    Raises:
        OpenError: there is no such generator, or it is damaged.
    """
    device = device or torch.device("cpu")
    if (where / CONFIG_NAME).is_file():
        return _open_export(where, which, weights, device)
    if (where / "trainer.json").is_file():
        if which != "newest":
            raise OpenError(f"{where} is one checkpoint; --checkpoint {which} goes with a run's directory")
        return _open_checkpoint(where, weights, device)
    if (where / "config.yaml").is_file():
        try:
            [path] = subject.choose(where, which, load_config(where / "config.yaml"))
        except EvaluationError as error:
            raise OpenError(str(error)) from error
        return _open_checkpoint(path, weights, device)
    raise OpenError(
        f"{where} holds none of config.yaml (a run), trainer.json (a checkpoint or snapshot) and {CONFIG_NAME} (an "
        "export): give the directory run.dir/run.name of a run, a step-N in it, or what launch/export.py wrote"
    )


def _open_checkpoint(path: Path, weights: str, device: torch.device) -> Opened:
    from pipeline import generated  # heavy: torch-fidelity

    if fault := checkpoint.find_fault(path):
        raise OpenError(f"{path} is damaged ({fault}); choose another with --checkpoint STEP")
    state = json.loads((path / "trainer.json").read_text())
    config = config_from_dict(state["config"], str(path / "trainer.json"))
    data = (path / {"ema": "ema.safetensors", "raw": "generator.safetensors"}[weights]).read_bytes()
    class_names, class_titles, remarks = _class_names(config, state["dataset_id"])
    return Opened(
        path=path,
        step=state["step"],
        weights=weights,
        weights_sha256=hashlib.sha256(data).hexdigest(),
        config=config,
        dataset_id=state["dataset_id"],
        generator=generated.load(safetensors.torch.load(data), config, device),
        z_dim=config.model.z_dim,
        num_classes=config.model.num_classes,
        resolution=config.model.resolution,
        class_names=class_names,
        class_titles=class_titles,
        remarks=remarks,
    )


def _open_export(path: Path, which: str, weights: str, device: torch.device) -> Opened:
    if (which, weights) != ("newest", "ema"):
        raise OpenError(f"{path} is an export, which holds one generator: leave out --checkpoint and --weights")
    config = read_config(path)
    generator = load(path, device)
    return Opened(
        path=path,
        step=config["provenance"]["step"],
        weights=config["provenance"]["weights"],
        weights_sha256=hashlib.sha256((path / WEIGHTS_NAME).read_bytes()).hexdigest(),
        config=None,
        dataset_id=config["provenance"]["dataset_id"],
        generator=generator,
        z_dim=generator.z_dim,
        num_classes=generator.num_classes,
        resolution=generator.resolution,
        class_names=tuple(config["class_names"]),
        class_titles=tuple(config["class_titles"]),
        remarks=(),
    )


def _class_names(config: Config, dataset_id: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Returns names, titles and remarks; the shards may be elsewhere by now, and pictures do without them."""
    if not config.model.num_classes:
        return (), (), ()
    try:
        found = open_shard_set(config.data.shards)
    except ShardSetError as error:
        return (), (), (f"the classes have numbers only: {error}",)
    if found.dataset_id != dataset_id:
        return (), (), (f"the classes have numbers only: {config.data.shards} is another set than was trained on",)
    return found.manifest.class_names, found.manifest.class_titles, ()


def open_discriminator(opened: Opened, device: torch.device | None = None) -> nn.Module | None:
    """Returns the discriminator of the same step in float32, without gradients; None where none was kept.

    Checkpoints have one, snapshots and exports do not.
    """
    if opened.config is None or opened.run_dir is None:
        return None
    path = checkpoint.checkpoints_dir(opened.run_dir) / opened.path.name
    if not path.is_dir() or checkpoint.find_fault(path) is not None:
        return None
    discriminator = build_discriminator(opened.config)
    discriminator.load_state_dict(safetensors.torch.load_file(path / "discriminator.safetensors"))
    return discriminator.to(device or torch.device("cpu"), torch.float32).eval().requires_grad_(False)
