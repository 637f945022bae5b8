"""Program of test_elastic.py: trains, and notes what this rank was given and what its losses were.

Usage: elastic_worker.py CONFIG NOTES [override ...]. NOTES/rank-R.jsonl gets, in the order of training,
["real", batch number, rows], ["noise", z purpose, step, index, rows] and ["loss", network, step, loss]; rows are lists,
one of each micro-batch, of what identifies a row of it.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from pipeline.backend import Player
from pipeline.config import load_config
from pipeline.gan import Gan
from pipeline.loader import Loader
from pipeline.trainer import train


def main() -> None:
    config_path, notes, *overrides = sys.argv[1:]
    config = load_config(config_path, overrides)
    batches_of, draw, update = Loader.batches, Gan._draw, Player.update

    with open(Path(notes) / f"rank-{os.environ.get('RANK', '0')}.jsonl", "a", buffering=1) as file:

        def note(*what) -> None:
            file.write(json.dumps(what) + "\n")

        def noted_batches(self, first_batch_number=0):
            for batch in batches_of(self, first_batch_number):
                pixels = [digest(image) for image in batch.images]
                rows = list(
                    zip(batch.sample_ids.tolist(), batch.labels.tolist(), batch.flip.tolist(), pixels, strict=True)
                )
                per_micro_batch = len(rows) // config.train.accumulation_steps
                parts = [rows[first : first + per_micro_batch] for first in range(0, len(rows), per_micro_batch)]
                note("real", batch.number, parts)
                yield batch

        def noted_draw(self, z_purpose, labels_purpose, step, index, attempt):
            noises = draw(self, z_purpose, labels_purpose, step, index, attempt)
            parts = [list(zip(map(digest, noise.z), noise.labels.tolist(), strict=True)) for noise in noises]
            note("noise", z_purpose, step, index, parts)
            return noises

        def noted_update(self, step, loss):
            note("loss", self.name, step, float(loss))
            return update(self, step, loss)

        Loader.batches, Gan._draw, Player.update = noted_batches, noted_draw, noted_update
        train(config)


def digest(row) -> str:
    return hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    main()
