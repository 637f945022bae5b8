"""Program of test_health.py: a training in which one rank alone meets a NaN, in the loss and later in a buffer.

Usage: health_worker.py CONFIG. Run by torch.distributed.run.
"""

import os
import sys

from pipeline.backend import Player
from pipeline.config import load_config
from pipeline.trainer import train

update, left = Player.update, {"loss", "buffer"}


def poisoned(self, step, loss):
    if os.environ["RANK"] == "1" and self.name == "generator":
        if step == 3 and "loss" in left:
            left.discard("loss")
            loss = loss * float("nan")
        if step == 5 and "buffer" in left:
            left.discard("buffer")
            dict(self.module.named_buffers())["final_norm.running_var"][0] = float("inf")
    return update(self, step, loss)


Player.update = poisoned
train(load_config(sys.argv[1]))
