"""Program of test_updates.py: five updates of a tiny float64 SAGAN, and what rank 0 saw of them, in a file.

Usage: update_worker.py CONFIG OUT [override ...] [--noise-by-rank]. Run by torch.distributed.run or by itself.
"""

import copy
import sys

import torch

from pipeline import gan as gan_module
from pipeline.backend import Player
from pipeline.config import load_config
from pipeline.gan import Gan
from pipeline.manifest import open_shard_set
from pipeline.noise import draw_z
from pipeline.trainer import ReplicaError, Trainer
from pipeline.world import World


def main() -> None:
    config_path, out, *rest = sys.argv[1:]
    config = load_config(config_path, [item for item in rest if item != "--noise-by-rank"])
    world = World("cpu")
    seen: dict[str, list] = {"gradients": [], "losses": [], "sample_ids": [], "z": []}

    def recording_update(self: Player, step: int, loss: torch.Tensor) -> torch.Tensor:
        seen["gradients"].append({name: p.grad.clone() for name, p in self.module.named_parameters()})
        seen["losses"].append(sum(world.gather(float(loss))) / world.size)
        return update(self, step, loss)

    def recording_draw(self: Gan, *purpose) -> list:
        noises = draw(self, *purpose)
        # Rows of the global micro-batches again, from every rank's part.
        parts = zip(*world.gather([noise.z for noise in noises]), strict=True)
        seen["z"].append(torch.cat([torch.cat(micro_batch) for micro_batch in parts]))
        return noises

    update, draw = Player.update, Gan._draw
    Player.update, Gan._draw = recording_update, recording_draw
    if "--noise-by-rank" in rest:
        gan_module.draw_z = lambda seed, *purpose: draw_z(seed + world.rank, *purpose)
    trainer = Trainer(config, world, open_shard_set(config.data.shards))
    batches = trainer.loader.batches(0)
    for _ in range(5):
        trainer._one_step(recorded(batches, seen, world, config.train.accumulation_steps))
    if world.is_main:
        seen["networks"] = copy.deepcopy(trainer.gan.state_dicts())
    if world.size > 1:
        seen["replica_errors"] = world.gather(spoil_last_rank(trainer, world))
    if world.is_main:
        torch.save(seen, out)
    world.shutdown()


def spoil_last_rank(trainer: Trainer, world: World) -> str:
    """Changes one buffer of the last rank by the last bit, as a replica that drifts would, and tries to save."""
    if world.rank == world.size - 1:
        running_var = trainer.gan.generator.module.blocks[0].norm1.norm.running_var
        running_var[0] = torch.nextafter(running_var[0], torch.tensor(9.0, dtype=running_var.dtype))
    try:
        trainer._save()
    except ReplicaError as error:
        return str(error)
    return "saved"


def recorded(batches, seen, world, accumulation_steps):
    for batch in batches:
        parts = zip(*world.gather(batch.sample_ids.chunk(accumulation_steps)), strict=True)
        seen["sample_ids"].append(torch.cat([torch.cat(micro_batch) for micro_batch in parts]))
        yield batch


if __name__ == "__main__":
    main()
