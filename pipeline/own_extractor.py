"""A feature extractor of the user's own, for images that Inception knows nothing of."""

import hashlib
import importlib
import inspect
import io
import re
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from pipeline.features import EvaluationError, Extractor

_TAKEN = r"\d+k?|raw|standing|batch_statistics|balanced|unofficial|random_features|validation|foreign_reference"


def open_own(where: str, image_size: int, device: torch.device) -> Extractor:
    """Loads an extractor and tries it on two images.

    It is a network that maps images (N, 3, H, W) uint8 to features (N, D), or to features and class logits (N, C).
    Without logits there is no Inception Score. Its scores go by its name: `fid_NAME`.

    Args:
        where: `FILE.pt`, TorchScript; or `package.module:function`, a function without arguments that returns an
            nn.Module.
        image_size: side of the images, pixels.
        device: where it will run.

    Raises:
        EvaluationError: it cannot be loaded or is no such network.
    """
    network, content = _load_file(Path(where)) if where.endswith(".pt") else _call(where)
    network = network.to(device).eval()
    name = re.sub(r"\W+", "_", Path(where).stem if where.endswith(".pt") else where).strip("_").lower()
    if re.fullmatch(_TAKEN, name):
        raise EvaluationError(
            f"evaluation.features={where} would call its scores fid_{name}, which means something else; rename it"
        )
    images = torch.arange(2 * 3 * image_size**2, device=device).reshape(2, 3, image_size, image_size).to(torch.uint8)
    try:
        features, logits = Extractor(name, "", "own", 0, network)(images)
        good = features.ndim == 2 and len(features) == 2 and features.dtype == torch.float32
        good = good and (logits is None or (logits.ndim == 2 and len(logits) == 2))
        found = f"{tuple(features.shape)} {features.dtype}"
    except Exception as error:  # whatever a network of the user's may raise
        good, found = False, f"{type(error).__name__}: {error}"
    if not good:
        raise EvaluationError(
            f"evaluation.features={where} must map (N, 3, H, W) uint8 to (N, D) float32 features, or to a tuple of "
            f"these and (N, C) logits; two images of {image_size} px gave {found}"
        )
    return Extractor(name, hashlib.sha256(content).hexdigest(), "own", features.shape[1], network)


def _load_file(path: Path) -> tuple[nn.Module, bytes]:
    try:
        content = path.read_bytes()
        with warnings.catch_warnings():
            # torch advises torch.export; TorchScript files are what published feature networks come as.
            warnings.simplefilter("ignore", DeprecationWarning)  # so it says in torch 2.11
            warnings.simplefilter("ignore", FutureWarning)  # and so in 2.15
            network: nn.Module = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]  # torch leaves it untyped
    except (OSError, RuntimeError) as error:
        raise EvaluationError(f"evaluation.features={path} is no TorchScript file that can be read: {error}") from error
    return network, content


def _call(where: str) -> tuple[nn.Module, bytes]:
    """Returns what the function makes; its identity is its name, the values of its weights and its module's text."""
    module, _, function = where.partition(":")
    try:
        imported = importlib.import_module(module)
        network = getattr(imported, function)()
    except (ImportError, AttributeError) as error:
        raise EvaluationError(
            f"evaluation.features={where} cannot be imported ({error}); set PYTHONPATH to the folder it lies in"
        ) from error
    if not isinstance(network, nn.Module):
        raise EvaluationError(f"evaluation.features={where} must return an nn.Module, got {type(network).__name__}")
    tensors = sorted(network.state_dict().items())
    weights = b"".join(name.encode() + tensor.detach().cpu().numpy().tobytes() for name, tensor in tensors)
    return network, where.encode() + weights + _source(imported)


def _source(module: ModuleType) -> bytes:
    """Returns the text of a module, where there is one: what it does to images before the network is in there."""
    path = inspect.getsourcefile(module)
    return Path(path).read_bytes() if path else b""
