"""The mathematics of one update: hinge GAN with one discriminator pass over real and fake images together.

Zhang et al. 2019 (arXiv 1805.08318), section 4; the concatenated pass as in BigGAN (arXiv 1809.11096).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from pipeline.backend import Player
from sagan import advance_spectral_norm, hinge_d, hinge_g


@dataclass(frozen=True)
class Noise:
    """What the generator is asked for: z (n, z_dim), labels (n,) int64 or None without classes."""

    z: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class RealImages:
    """Real images (n, 3, R, R) in [-1, 1] and their labels (n,) int64 or None without classes."""

    images: Tensor
    labels: Tensor | None


def discriminator_step(
    step: int,
    generator: Player,
    discriminator: Player,
    micro_batches: Sequence[tuple[RealImages, Noise]],
    autocast: AbstractContextManager[object],
) -> dict[str, Tensor]:
    """Updates the discriminator once.

    L_D = E[max(0, 1 - D(x, y))] + E[max(0, 1 + D(G(z, y'), y'))], averaged over micro-batches and ranks.

    Args:
        step: generator update this belongs to.
        generator: makes the fakes, without graph; its BatchNorm statistics advance.
        discriminator: is updated.
        micro_batches: this rank's part of each micro-batch; each as many fakes as reals.
        autocast: reentrant context of the forward passes.

    Returns:
        Detached device scalars. Means: d_loss, real_logits, fake_logits. Signs of collapse, within a micro-batch of a
        rank: real_logits_std and fake_logits_std; real_pixel_std and fake_pixel_std, the spread of the images at a
        pixel, averaged over pixels. d_gradient_norm: of all gradients together.
    """
    with record_function("spectral norm"):
        advance_spectral_norm(discriminator.module)
    totals = torch.zeros(len(_D_NUMBERS), device=micro_batches[0][0].images.device)
    for real, noise in discriminator.accumulate(micro_batches):
        with autocast:
            with torch.no_grad():
                fake_images = generator.module(noise.z, noise.labels)
            images = torch.cat([real.images, fake_images.to(real.images.dtype)])
            real_logits, fake_logits = discriminator(images, _cat_labels(real.labels, noise.labels)).chunk(2)
        loss = hinge_d(real_logits, fake_logits)
        discriminator.backward(loss / len(micro_batches))
        totals = totals + _numbers(loss, real_logits, fake_logits, images) / len(micro_batches)
    discriminator.update(step, totals[0])
    numbers = dict(zip(_D_NUMBERS, totals, strict=True))
    return numbers | {"d_gradient_norm": discriminator.watch.gradient_norm}


def generator_step(
    step: int,
    generator: Player,
    discriminator: Player,
    micro_batches: Sequence[Noise],
    autocast: AbstractContextManager[object],
) -> tuple[dict[str, Tensor], Tensor]:
    """Updates the generator once: L_G = -E[D(G(z, y), y)].

    The discriminator is frozen and called raw: it has its new weights, their sigma taken with unmoved u and v, and
    none of its gradients are made or sent. The generator's u and v advanced before the discriminator step.

    Args:
        step: this generator update.
        generator: is updated; its BatchNorm statistics advance.
        discriminator: scores the fakes.
        micro_batches: this rank's part of each micro-batch.
        autocast: reentrant context of the forward passes.

    Returns:
        Detached device scalars (g_loss, g_gradient_norm), and the flag that is 1 where the update was skipped as
        non-finite.
    """
    total = torch.zeros((), device=micro_batches[0].z.device)
    with discriminator.frozen():
        for noise in generator.accumulate(micro_batches):
            with autocast:
                fake_logits = discriminator.module(generator(noise.z, noise.labels), noise.labels)
            loss = hinge_g(fake_logits) / len(micro_batches)
            generator.backward(loss)
            total = total + loss.detach()
    skipped = generator.update(step, total)
    return {"g_loss": total, "g_gradient_norm": generator.watch.gradient_norm}, skipped


_D_NUMBERS = (
    "d_loss", "real_logits", "fake_logits", "real_logits_std", "fake_logits_std", "real_pixel_std", "fake_pixel_std",
)  # fmt: skip


@torch.no_grad()
def _numbers(loss: Tensor, real_logits: Tensor, fake_logits: Tensor, images: Tensor) -> Tensor:
    """The `_D_NUMBERS` of one micro-batch."""
    spreads = [values.std(0, correction=0).mean() for values in (real_logits, fake_logits, *images.chunk(2))]
    return torch.stack([loss, real_logits.mean(), fake_logits.mean(), *spreads])


def _cat_labels(real: Tensor | None, fake: Tensor | None) -> Tensor | None:
    return None if real is None or fake is None else torch.cat([real, fake])
