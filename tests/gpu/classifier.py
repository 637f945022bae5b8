"""Trains a small classifier on a set of 32 px images and writes it as TorchScript, to score samples without a download.

    python tests/gpu/classifier.py SHARDS OUT.pt [cuda|cpu] [EPOCHS]

It maps (N, 3, 32, 32) uint8 to (N, 256) features and (N, classes) logits, as `evaluation.features` wants it.
"""

import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.loader import Loader
from pipeline.manifest import open_shard_set

BATCH_SIZE, HELD_OUT = 500, 10  # every tenth image is for the test


class Classifier(nn.Module):
    """Six convolutions, three scales."""

    def __init__(self, num_classes: int):
        super().__init__()
        blocks: list[nn.Module] = []
        for into, out, stride in ((3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)):
            blocks += [nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(256, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.blocks(images.float() / 127.5 - 1).mean((2, 3))
        return features, self.head(features)


def main(shards: str, out: str, device: str = "cuda", epochs: str = "10") -> None:
    shard_set = open_shard_set(shards)
    loader = Loader(shard_set, image_size=32, seed=0, global_batch_size=BATCH_SIZE, num_workers=2)
    updates = int(epochs) * shard_set.manifest.num_samples // BATCH_SIZE
    network = Classifier(shard_set.manifest.num_classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, updates)
    right = seen = 0
    for number, batch in zip(range(updates), loader.batches(0), strict=False):
        images, labels = batch.images.to(device), batch.labels.to(device)
        images = torch.where(batch.flip.to(device)[:, None, None, None], images.flip(3), images)
        test = batch.sample_ids.to(device) % HELD_OUT == 0
        loss = F.cross_entropy(network(images[~test])[1], labels[~test])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if number >= updates - shard_set.manifest.num_samples // BATCH_SIZE and test.any():  # the last epoch
            network.eval()
            with torch.no_grad():
                right += int((network(images[test])[1].argmax(1) == labels[test]).sum())
            seen += int(test.sum())
            network.train()
        if number % 100 == 0:
            print(f"update {number}/{updates}, loss {loss.item():.3f}", flush=True)
    print(f"{right / max(1, seen):.1%} of {seen} images that it was not fitted on are classified rightly -> {out}")
    with warnings.catch_warnings():
        # torch advises torch.export; TorchScript files are what published feature networks come as.
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(network.eval().cpu()).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
