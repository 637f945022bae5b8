import subprocess
import sys

import pytest

PROGRAM = """
import torch
from torch import nn

from pipeline.config import EvaluationConfig
from pipeline.feature_pass import first, see
from pipeline.features import Extractor
from pipeline.scores import compare
from pipeline.world import World

NUM_IMAGES = 50_000


class Noise(nn.Module):
    def forward(self, images):
        return torch.rand(len(images), 2048), torch.randn(len(images), 1008)


def blocks():
    for start in range(0, NUM_IMAGES, 64):
        yield start, torch.randint(0, 256, (min(64, NUM_IMAGES - start), 3, 4, 4), dtype=torch.uint8)


extractor = Extractor("noise", "0" * 64, "own", 2048, Noise())
seen = see(blocks(), first(NUM_IMAGES), extractor, World("cpu"), "images")
scores = compare(seen, seen.statistics, EvaluationConfig(), ("", ""))
assert abs(scores["fid"]) < 1e-6 and scores["precision"] == 1
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.slow  # 50,000 x 2048 features and all their scores
@pytest.mark.timeout(900)
def test_rank_0_stays_under_2_gb_for_50_000_images(repo_root):
    """The whole process at its peak, with FID, KID, precision and recall, and the Inception Score of 1008 logits."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=repo_root, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) * 1024 < 2e9
