"""How exactly scores are computed, and the record of what computed them."""

import importlib.metadata
import platform
from typing import Any

import torch

from pipeline import tracking
from pipeline.world import World, configure_determinism


def compute_exactly(device: torch.device) -> None:
    """Turns off what trades digits or repeatability for speed: TF32, and the search for the fastest convolution."""
    configure_determinism(True, device)
    # By fp32_precision, torch's newer names, it could not be asked for them again as torch.onnx does.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def provenance_of(world: World) -> dict[str, Any]:
    """Returns what made a result: versions, device, precision, processes, commit."""
    cuda = world.device.type == "cuda"
    commit, dirty = tracking.git_state()
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torch-fidelity", "numpy")},
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.processor() or platform.machine(),
        "tf32": {
            "matmul": torch.backends.cuda.matmul.fp32_precision == "tf32",
            "convolution": torch.backends.cudnn.conv.fp32_precision == "tf32",  # type: ignore[attr-defined]  # torch leaves it untyped
        },
        "world_size": world.size,
        "git_commit": commit,
        "git_dirty": dirty,
    }
