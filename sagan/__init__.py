"""SAGAN's networks, losses and weight average; needs torch only."""

from sagan.discriminator import Discriminator
from sagan.ema import Ema
from sagan.generator import Generator
from sagan.layers import advance_spectral_norm, attention_gains, spectral_norms
from sagan.losses import hinge_d, hinge_g

__all__ = [
    "Discriminator",
    "Ema",
    "Generator",
    "advance_spectral_norm",
    "attention_gains",
    "hinge_d",
    "hinge_g",
    "spectral_norms",
]
