"""From a configuration to its networks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.config import Config
from sagan import DcganDiscriminator, DcganGenerator, Discriminator, Generator


def build_generator(config: Config) -> Generator | DcganGenerator:
    """Returns the generator of a configuration, initialised from the global torch RNG."""
    model = config.model
    network = DcganGenerator if model.architecture == "dcgan" else Generator
    training: dict[str, Any] = {
        "init": model.init,
        "spectral_norm_eps": model.spectral_norm_eps,
        "batch_norm_momentum": model.batch_norm_momentum,
        "sync_batch_norm": model.sync_batch_norm,
    }
    return network(**generator_arguments(config), **training)


def generator_arguments(config: Config) -> dict[str, Any]:
    """Returns the arguments that decide what images a generator with given weights makes; plain values."""
    model = config.model
    if model.architecture == "dcgan":
        return {
            "channels": model.g_channels,
            "z_dim": model.z_dim,
            "attention": model.attention_resolution is not None,
            "batch_norm_eps": model.batch_norm_eps,
        }
    return {
        "resolution": model.resolution,
        "channels": model.g_channels,
        "num_classes": model.num_classes,
        "z_dim": model.z_dim,
        "attention_resolution": model.attention_resolution,
        "batch_norm_eps": model.batch_norm_eps,
        "spectral_norm_on_class_tables": model.spectral_norm_on_class_tables,
    }


def build_discriminator(config: Config) -> Discriminator | DcganDiscriminator:
    """Returns the discriminator of a configuration, initialised from the global torch RNG."""
    model = config.model
    if model.architecture == "dcgan":
        return DcganDiscriminator(
            model.d_channels,
            model.attention_resolution is not None,
            init=model.init,
            spectral_norm_eps=model.spectral_norm_eps,
        )
    return Discriminator(
        model.resolution,
        model.d_channels,
        model.num_classes,
        model.attention_resolution,
        init=model.init,
        spectral_norm_eps=model.spectral_norm_eps,
    )


def build_shapes(config: Config) -> tuple[nn.Module, nn.Module]:
    """Returns generator and discriminator on the meta device: all shapes, no numbers, in milliseconds."""
    with torch.device("meta"), _WithoutDraws():
        return build_generator(config), build_discriminator(config)


def count_parameters(config: Config) -> tuple[int, int]:
    """Returns the number of parameters of generator and discriminator, without building either."""
    generator, discriminator = (sum(p.numel() for p in network.parameters()) for network in build_shapes(config))
    return generator, discriminator


class _WithoutDraws(TorchFunctionMode):
    """Leaves out draws of normal numbers: on the meta device the first of them imports torch._dynamo, for 3 s."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if function is nn.init.normal_ else function(*args, **(kwargs or {}))
