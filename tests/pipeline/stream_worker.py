"""Program of test_streaming.py: trains, and notes which samples this rank was handed for each batch.

Usage: stream_worker.py CONFIG NOTES [override ...]. NOTES/rank-R.jsonl gets a line [batch number, sample ids] each.
Override values may hold {rank}: ranks that are started differently.
"""

import json
import os
import sys
from pathlib import Path

from launch.errors import report
from pipeline.config import load_config
from pipeline.loader import Loader
from pipeline.manifest import ShardSetError
from pipeline.trainer import train
from pipeline.world import RanksDifferError


def main() -> int:
    config_path, notes, *overrides = sys.argv[1:]
    rank = os.environ.get("RANK", "0")
    batches_of = Loader.batches

    def noted_batches(self, first_batch_number=0):
        with open(Path(notes) / f"rank-{rank}.jsonl", "a") as file:
            for batch in batches_of(self, first_batch_number):
                file.write(json.dumps([batch.number, batch.sample_ids.tolist()]) + "\n")
                file.flush()
                yield batch

    Loader.batches = noted_batches
    try:
        train(load_config(config_path, [text.replace("{rank}", rank) for text in overrides]))
    except (ShardSetError, RanksDifferError) as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
