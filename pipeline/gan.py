"""The two networks with all that one update needs of them: players, average, noise, precision."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from pipeline.backend import Player
from pipeline.batch import Batch
from pipeline.config import Config
from pipeline.networks import build_discriminator, build_generator
from pipeline.noise import Purpose, draw_labels, draw_z, rank_micro_batches
from pipeline.steps import Noise, RealImages, discriminator_step, generator_step
from pipeline.world import World
from sagan import Ema, advance_spectral_norm

_DTYPES = {"float32": torch.float32, "bf16": torch.float32, "float64": torch.float64}


class Gan:
    """Generator, discriminator and the average of the generator, on this rank's device.

    Args:
        config: of the run; the networks are drawn from its seed, equal on every rank.
        world: the processes that share them.
    """

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        self._dtype = _DTYPES[config.train.precision]
        self._layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self._autocast: AbstractContextManager[Any] = (
            torch.autocast(world.device.type, torch.bfloat16) if config.train.precision == "bf16" else nullcontext()
        )
        torch.manual_seed(config.run.seed)
        self.generator = self._player("generator", build_generator(config), config.optimizer.lr_g)
        self.discriminator = self._player("discriminator", build_discriminator(config), config.optimizer.lr_d)
        self.ema = Ema(self.generator.module, config.ema.decay, config.ema.start_step)

    @property
    def players(self) -> tuple[Player, Player]:
        """The generator's and the discriminator's."""
        return self.generator, self.discriminator

    def update(self, step: int, batches: Sequence[Batch], attempt: int) -> dict[str, Tensor]:
        """Updates the discriminator once per batch, the generator once, then the average; the host does not wait.

        Args:
            step: number of this generator update, from 1.
            batches: this rank's rows of `train.num_d_steps` global batches.
            attempt: how often this step was gone back on; each time it draws other noise.

        Returns:
            Detached device scalars, see `pipeline.steps`.
        """
        with record_function("spectral norm"):
            advance_spectral_norm(self.generator.module)
        losses: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            noises = self._draw("d_z", "d_labels", step, index, attempt)
            pairs = list(zip(self._to_device(batch), noises, strict=True))
            with record_function("discriminator step"):
                losses |= discriminator_step(step, self.generator, self.discriminator, pairs, self._autocast)
        noises = self._draw("g_z", "g_labels", step, 0, attempt)
        with record_function("generator step"):
            g_losses, skipped = generator_step(step, self.generator, self.discriminator, noises, self._autocast)
        with record_function("ema"):
            self.ema.update(self.generator.module, step, skipped > 0)
        return losses | g_losses

    def state_dicts(self) -> dict[str, dict[str, Tensor]]:
        """Returns the weights and buffers of generator, discriminator and ema."""
        return {
            "generator": self.generator.module.state_dict(),
            "discriminator": self.discriminator.module.state_dict(),
            "ema": self.ema.module.state_dict(),
        }

    def _player(self, name: str, module: nn.Module, learning_rate: float) -> Player:
        module.to(self.world.device, self._dtype).to(memory_format=self._layout).train()
        if self.config.train.compile:
            module.compile()
        settings = self.config.optimizer
        optimizer = torch.optim.Adam(module.parameters(), learning_rate, settings.betas, settings.eps, fused=True)
        return Player(name, module, optimizer, self.world)

    def _draw(self, z_purpose: Purpose, labels_purpose: Purpose, step: int, index: int, attempt: int) -> list[Noise]:
        """Draws noise and labels for the whole global batch and returns this rank's part of each micro-batch."""
        seed, model, train = self.config.run.seed, self.config.model, self.config.train
        z = draw_z(seed, z_purpose, step, index, train.global_batch_size, model.z_dim, attempt)
        labels = draw_labels(seed, labels_purpose, step, index, train.global_batch_size, model.num_classes, attempt)
        z_parts = self._this_ranks(z.to(self._dtype))
        labels_parts = [None] * len(z_parts) if labels is None else self._this_ranks(labels)
        return [Noise(*parts) for parts in zip(z_parts, labels_parts, strict=True)]

    def _this_ranks(self, rows: Tensor) -> list[Tensor]:
        if self.world.device.type == "cuda":
            rows = rows.pin_memory()  # else the copy waits for the device
        cut = rank_micro_batches(rows, self.config.train.accumulation_steps, self.world.rank, self.world.size)
        return [part.to(self.world.device, non_blocking=True) for part in cut]

    def _to_device(self, batch: Batch) -> list[RealImages]:
        """Moves uint8 images to the device; there they become [-1, 1] and, some of them, mirrored."""
        device, count = self.world.device, self.config.train.accumulation_steps
        images = batch.images.to(device, non_blocking=True).to(self._dtype) / 127.5 - 1
        if self.config.data.horizontal_flip:
            flip = batch.flip.to(device, non_blocking=True)[:, None, None, None]
            images = torch.where(flip, images.flip(3), images)
        images = images.contiguous(memory_format=self._layout)
        labels = batch.labels.to(device, non_blocking=True).chunk(count) if self.config.model.num_classes else None
        return [
            RealImages(rows, labels[index] if labels is not None else None)
            for index, rows in enumerate(images.chunk(count))
        ]
