"""One process of several that see a generator's samples: `inception_worker.py CONFIG GENERATOR OUT BATCH_SIZE...`."""

import sys
from dataclasses import replace

import torch

from pipeline import features, generated
from pipeline.config import load_config
from pipeline.networks import build_generator
from pipeline.provenance import compute_exactly
from pipeline.world import World


def main(config_path: str, generator_path: str, out: str, *batch_sizes: str) -> None:
    config = load_config(config_path)
    world = World(config.run.device)
    generator = build_generator(config).eval()
    generator.load_state_dict(torch.load(generator_path))
    compute_exactly(world.device)
    extractor = features.inception(features.read_weights(config.evaluation), world.device)
    found = {}
    for batch_size in map(int, batch_sizes):
        asked = replace(config, evaluation=replace(config.evaluation, batch_size=batch_size))
        found[batch_size] = generated.make_samples(generator, asked, extractor, world)
    if world.is_main:
        torch.save({"world_size": world.size, "found": found}, out)
    world.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
