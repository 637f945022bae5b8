"""The mathematics of one update: hinge GAN with one discriminator pass over real and fake images together.

Zhang et al. 2019 (arXiv 1805.08318), section 4; the concatenated pass as in BigGAN (arXiv 1809.11096).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

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
        Detached device scalars: d_loss, real_logits, fake_logits (means).
    """
    advance_spectral_norm(discriminator.module)
    totals = torch.zeros(3, device=micro_batches[0][0].images.device)
    for real, noise in discriminator.accumulate(micro_batches):
        with autocast:
            with torch.no_grad():
                fake_images = generator.module(noise.z, noise.labels)
            images = torch.cat([real.images, fake_images.to(real.images.dtype)])
            real_logits, fake_logits = discriminator(images, _cat_labels(real.labels, noise.labels)).chunk(2)
        loss = hinge_d(real_logits, fake_logits) / len(micro_batches)
        discriminator.backward(loss)
        totals = totals + torch.stack([loss.detach(), *_means(len(micro_batches), real_logits, fake_logits)])
    discriminator.update(step, totals[0])
    return dict(zip(("d_loss", "real_logits", "fake_logits"), totals, strict=True))


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
        Detached device scalars (g_loss), and the flag that is 1 where the update was skipped as non-finite.
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
    return {"g_loss": total}, skipped


def _means(num_micro_batches: int, *logits: Tensor) -> list[Tensor]:
    return [values.detach().mean() / num_micro_batches for values in logits]


def _cat_labels(real: Tensor | None, fake: Tensor | None) -> Tensor | None:
    return None if real is None or fake is None else torch.cat([real, fake])
