"""SAGAN's networks, losses and weight average; needs torch only, `load` safetensors too."""

from sagan.dcgan import DcganDiscriminator, DcganGenerator
from sagan.discriminator import Discriminator
from sagan.ema import Ema
from sagan.generator import Generator
from sagan.layers import advance_spectral_norm, attention_gains, spectral_norms
from sagan.losses import hinge_d, hinge_g
from sagan.portable import fold_spectral_norm, load

__all__ = [
    "DcganDiscriminator",
    "DcganGenerator",
    "Discriminator",
    "Ema",
    "Generator",
    "advance_spectral_norm",
    "attention_gains",
    "fold_spectral_norm",
    "hinge_d",
    "hinge_g",
    "load",
    "spectral_norms",
]
