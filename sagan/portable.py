"""A generator as a folder of files, without training's spectral norm: `config.json` and `model.safetensors`."""

import copy
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sagan.dcgan import DcganGenerator
from sagan.generator import Generator
from sagan.layers import SNConv2d, SNEmbedding, SNLinear

FORMAT = 1
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
_ARCHITECTURES: dict[str, type[Generator] | type[DcganGenerator]] = {"resnet": Generator, "dcgan": DcganGenerator}

Network = TypeVar("Network", bound=nn.Module)


def fold_spectral_norm(network: Network) -> Network:
    """Return a copy of a network whose spectrally normalised layers are plain ones that hold weight / sigma.

    In eval mode it computes what the network does; it cannot be trained on as that can.
    """
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, SNConv2d | SNLinear | SNEmbedding):
                setattr(parent, name, _plain(layer))
    return network


@torch.no_grad()
def _plain(layer: SNConv2d | SNLinear | SNEmbedding) -> nn.Module:
    with torch.device("meta"):  # no time for drawing weights that are replaced
        match layer:
            case SNConv2d():
                size, has_bias = layer.kernel_size[0], layer.bias is not None
                plain: nn.Conv2d | nn.Linear | nn.Embedding = nn.Conv2d(
                    layer.in_channels, layer.out_channels, size, padding=size // 2, bias=has_bias
                )
            case SNLinear():
                plain = nn.Linear(layer.in_features, layer.out_features)
            case SNEmbedding():
                plain = nn.Embedding(layer.num_embeddings, layer.embedding_dim)
    weight = layer.weight if layer.weight.is_meta else layer.normalized_weight()  # of meta tensors the shape will do
    plain.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    if not isinstance(layer, SNEmbedding) and layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.clone(), requires_grad=layer.bias.requires_grad)
    return plain.train(layer.training)


def load(directory: Path | str, device: torch.device | str = "cpu") -> Generator | DcganGenerator:
    """Return the generator of an exported folder, in eval mode: `generator(z, labels) -> images`.

    Attributes `z_dim`, `num_classes` and `resolution` tell what it takes and gives; see `Generator`.

    Args:
        directory: that `launch/export.py` wrote; nothing else but it is read.
        device: where the generator will be.

    Raises:
        FileNotFoundError: no such folder, or not all of it.
        ValueError: a folder of a format that this version does not read.
    """
    from safetensors.torch import load_file  # the library itself needs torch alone

    config = read_config(directory)
    with torch.device("meta"):
        network = fold_spectral_norm(_ARCHITECTURES[config["architecture"]](**config["arguments"]))
    network.load_state_dict(load_file(Path(directory) / WEIGHTS_NAME, device=str(device)), assign=True)
    return network.eval().requires_grad_(False)


def read_config(directory: Path | str) -> dict[str, Any]:
    """Return config.json of an exported folder: `architecture`, `arguments`, `class_names` and where it comes from.

    Raises:
        FileNotFoundError: no such folder, or no export.
        ValueError: a folder of a format that this version does not read.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no exported generator (launch/export.py): it holds no {CONFIG_NAME}")
    config: dict[str, Any] = json.loads(path.read_text())
    if config.get("format") != FORMAT or config.get("architecture") not in _ARCHITECTURES:
        raise ValueError(
            f"{path} is of format {config.get('format')!r}, architecture {config.get('architecture')!r}; this version "
            f"reads format {FORMAT} of {' and '.join(_ARCHITECTURES)}: use the code that wrote it, or export again"
        )
    return config
