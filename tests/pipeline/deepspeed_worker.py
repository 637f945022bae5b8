"""Program of test_deepspeed.py: five updates under whatever backend launched it, then one that is poisoned.

Usage: deepspeed_worker.py CONFIG OUT [override ...]. Rank 0 writes what was seen to OUT.
"""

import copy
import sys

import torch

from pipeline import checkpoint
from pipeline import gan as gan_module
from pipeline.backend import Player
from pipeline.config import load_config
from pipeline.manifest import open_shard_set
from pipeline.networks import build_generator
from pipeline.steps import discriminator_step
from pipeline.trainer import Trainer
from pipeline.world import World


def build_without_idle_biases(config):
    """The true gradient of a bias that feeds a batch norm is 0: float32 Adam makes steps of rounding noise there."""
    generator = build_generator(config)
    for block in generator.blocks:
        for convolution in (block.conv1, block.conv2, block.shortcut):
            convolution.bias = None
    return generator


def main() -> None:
    config_path, out, *overrides = sys.argv[1:]
    config = load_config(config_path, overrides)
    world = World("cpu")
    losses = []

    def recording_update(self: Player, step: int, loss: torch.Tensor) -> torch.Tensor:
        losses.append(sum(world.gather(float(loss))) / world.size)
        return update(self, step, loss)

    update, Player.update = Player.update, recording_update
    gan_module.build_generator = build_without_idle_biases
    trainer = Trainer(config, world, open_shard_set(config.data.shards))
    batches = trainer.loader.batches(0)
    for _ in range(5):
        trainer._one_step(batches)
    players = (trainer.gan.generator, trainer.gan.discriminator)
    seen = {
        "backend": trainer.gan.generator.backend,
        "losses": list(losses),
        "networks": copy.deepcopy(trainer.gan.state_dicts()),
        "optimizers": copy.deepcopy({player.name: player.optimizer_state() for player in players}),
    }
    if world.size > 1:
        seen["rolled_back"] = world.gather(rolls_back(trainer))
        seen["poisoned"] = poisoned_update(trainer, world, batches)
        seen["dtypes"] = dtypes_under_autocast(trainer, next(batches))
    if world.is_main:
        torch.save(seen, out)
    world.shutdown()


def rolls_back(trainer: Trainer) -> bool:
    """Whether a step after going back to a checkpoint gives the same bits again; replicas are compared on the way."""
    trainer._save()
    found = []
    for _ in range(2):
        trainer._restore(checkpoint.load(checkpoint.published(trainer.config.run_dir)[-1]))
        trainer._one_step(trainer.loader.batches(trainer.step * trainer.config.train.num_d_steps))
        found.append(checkpoint.digests(trainer.gan.state_dicts()))
        trainer._compare_replicas(trainer.gan.state_dicts())
    return found[0] == found[1]


def poisoned_update(trainer: Trainer, world: World, batches) -> dict:
    """A discriminator update whose gradient is NaN in one tensor, on the last rank, in the first micro-batch only."""
    player, left = trainer.gan.discriminator, [1]

    def poison(gradient: torch.Tensor) -> torch.Tensor | None:
        if world.rank < world.size - 1 or not left[0]:
            return None
        left[0] -= 1
        return torch.full_like(gradient, float("nan"))

    before = checkpoint.digests({"d": dict(player.module.named_parameters())}), str(player.optimizer_state())
    handle = player.module.embedding.weight.register_hook(poison)
    noises = trainer.gan._draw("d_z", "d_labels", 6, 0, 0)
    pairs = list(zip(trainer.gan._to_device(next(batches)), noises, strict=True))
    discriminator_step(6, trainer.gan.generator, player, pairs, trainer.gan._autocast)
    handle.remove()
    after = checkpoint.digests({"d": dict(player.module.named_parameters())}), str(player.optimizer_state())
    reports = world.gather(str(player.watch.report()))
    player.watch.reset()
    discriminator_step(7, trainer.gan.generator, player, pairs, trainer.gan._autocast)
    moved = checkpoint.digests({"d": dict(player.module.named_parameters())}) != before[0]
    return {"unchanged": world.gather(before == after), "reports": reports, "goes_on": moved,
            "finite": player.watch.report() is None}  # fmt: skip


def dtypes_under_autocast(trainer: Trainer, batch) -> list[torch.dtype]:
    """What a block of the discriminator gives under our autocast, when called through the backend."""
    found = []
    handle = trainer.gan.discriminator.module.blocks[0].register_forward_hook(lambda *args: found.append(args[2].dtype))
    real = trainer.gan._to_device(batch)[0]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = trainer.gan.discriminator(real.images, real.labels)
    handle.remove()
    return [*found, logits.dtype]


if __name__ == "__main__":
    main()
