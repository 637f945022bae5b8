"""Batches from small sets written here by hand: right samples, exact pixels, and damage told, not trained on."""

import dataclasses
import hashlib
import io
import multiprocessing
import re
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from pipeline.loader import Loader
from pipeline.manifest import INDEX_NAME, MANIFEST_NAME, Index, Manifest, Shard, ShardSetError, open_shard_set
from pipeline.order import flips, rank_rows

SIZE = 8
NUM_SAMPLES = 44
NUM_CLASSES = 5
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM_SAMPLES, SIZE, SIZE, 3), dtype=np.uint8)
LABELS = [sample % NUM_CLASSES for sample in range(NUM_SAMPLES)]
EXTENSIONS = {"raw": "bin", "webp": "webp", "png": "png", "jpeg444": "jpg", "original": "jpg"}


def encode(pixels, file_format, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


def write_set(directory, payloads, encoding="raw", image_size=SIZE, labels=None, per_shard=16, per_block=5):
    """Tars of `per_shard` samples in blocks of `per_block`, the last of each smaller; returns the opened set."""
    directory.mkdir()
    labels = labels or LABELS[: len(payloads)]
    shards, samples, blocks, hashes = [], [], [], []
    for first in range(0, len(payloads), per_shard):
        path, starts = directory / f"shard-{len(shards):06d}.tar", []
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in range(first, min(first + per_shard, len(payloads))):
                starts.append(tar.offset)
                samples.append((len(shards), tar.offset + 512, len(payloads[sample]), labels[sample]))
                parts = [(EXTENSIONS[encoding], payloads[sample]), ("cls", str(labels[sample]).encode())]
                for extension, data in parts:
                    member = tarfile.TarInfo(f"{sample:09d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            starts.append(tar.offset)
        data = path.read_bytes()
        for row in range(0, len(starts) - 1, per_block):
            start, stop = starts[row], starts[min(row + per_block, len(starts) - 1)]
            blocks.append((len(shards), start, stop, first + row))
            hashes.append(list(hashlib.sha256(data[start:stop]).digest()))
        shards.append(Shard(path.name, len(starts) - 1, len(data), hashlib.sha256(data).hexdigest(), None))
    sample_columns, block_columns = np.array(samples).T.copy(), np.array(blocks).T.copy()
    index = Index(
        sample_shard=sample_columns[0].astype(np.int32),
        sample_offset=sample_columns[1],
        sample_size=sample_columns[2].astype(np.int32),
        sample_label=sample_columns[3].astype(np.int32),
        block_shard=block_columns[0].astype(np.int32),
        block_start=block_columns[1],
        block_stop=block_columns[2],
        block_first_sample=np.append(block_columns[3], len(payloads)),
        block_sha256=np.array(hashes, np.uint8),
    )
    conditional = max(labels) >= 0
    fields = {field.name: None for field in dataclasses.fields(Manifest)} | {
        "format_version": 1,
        "name": "test",
        "split": "train",
        "complete": True,
        "image_size": image_size,
        "num_samples": len(payloads),
        "class_names": tuple("abcde") if conditional else (),
        "class_titles": (),
        "class_counts": tuple(np.bincount(labels, minlength=NUM_CLASSES).tolist()) if conditional else (),
        "encoding": encoding,
        "exif_orientation": "ignored",
        "num_enlarged": 0,
        "source": "test",
        "source_layout": "tree",
        "source_images": len(payloads),
        "skipped": (),
        "library_versions": {},
        "shards": tuple(shards),
        "index_sha256": hashlib.sha256(index.to_bytes()).hexdigest(),
    }
    (directory / INDEX_NAME).write_bytes(index.to_bytes())
    (directory / MANIFEST_NAME).write_bytes(Manifest(**fields).to_bytes())
    return open_shard_set(str(directory))


@pytest.fixture
def raw_set(tmp_path):
    return write_set(tmp_path / "set", [pixels.tobytes() for pixels in PIXELS])


def make_loader(shard_set, batch=8, **options):
    return Loader(shard_set, **{"image_size": SIZE, "seed": 1, "global_batch_size": batch} | options)


def take(loader, count, first=0):
    batches = loader.batches(first)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def equal(left, right):
    return left.number == right.number and all(torch.equal(a, b) for a, b in zip(left[:4], right[:4], strict=True))


@pytest.mark.parametrize("encoding", ["raw", "webp", "png"])
def test_lossless_batches_are_the_pixels_and_labels_of_the_plan(tmp_path, encoding):
    write = {
        "raw": np.ndarray.tobytes,
        "webp": lambda p: encode(p, "WEBP", lossless=True),
        "png": lambda p: encode(p, "PNG"),
    }
    loader = make_loader(write_set(tmp_path / "set", [write[encoding](pixels) for pixels in PIXELS], encoding))
    for batch in take(loader, 12, first=3):  # into the third epoch: 5 batches each
        expected = loader.plan.batch_sample_ids(batch.number)
        assert batch.sample_ids.tolist() == expected.tolist()
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(batch.images.numpy(), PIXELS[expected].transpose(0, 3, 1, 2))
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == [LABELS[sample] for sample in expected]


def test_jpeg_batches_are_what_pillow_decodes(tmp_path):
    payloads = [encode(pixels, "JPEG", quality=95, subsampling=0) for pixels in PIXELS]
    batch = take(make_loader(write_set(tmp_path / "set", payloads, "jpeg444")), 1)[0]
    expected = [np.asarray(Image.open(io.BytesIO(payloads[sample]))) for sample in batch.sample_ids]
    assert np.array_equal(batch.images.numpy(), np.stack(expected).transpose(0, 3, 1, 2))


def test_images_of_original_size_are_cropped_and_resized(tmp_path):
    rng = np.random.default_rng(1)
    sizes = [(int(height), int(width)) for height, width in rng.integers(9, 40, (NUM_SAMPLES, 2))]
    payloads = [encode(rng.integers(0, 256, (*size, 3), dtype=np.uint8), "JPEG") for size in sizes]
    batch = take(make_loader(write_set(tmp_path / "set", payloads, "original", image_size=None)), 1)[0]
    for image, sample in zip(batch.images, batch.sample_ids.tolist(), strict=True):
        source = Image.open(io.BytesIO(payloads[sample]))
        side = min(source.size)
        left, top = (source.width - side) // 2, (source.height - side) // 2
        square = source.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(square))


def test_a_set_without_classes_has_label_minus_one(tmp_path):
    shard_set = write_set(tmp_path / "set", [p.tobytes() for p in PIXELS], labels=[-1] * NUM_SAMPLES)
    assert take(make_loader(shard_set), 1)[0].labels.tolist() == [-1] * 8


def test_ranks_together_hand_over_the_batch_of_one_process(raw_set):
    alone = take(make_loader(raw_set, accumulation_steps=2), 7)
    ranks = [take(make_loader(raw_set, accumulation_steps=2, rank=rank, world_size=4), 7) for rank in range(4)]
    for number, batch in enumerate(alone):
        for rank in range(4):
            rows = rank_rows(8, 2, rank, 4)
            assert torch.equal(ranks[rank][number].images, batch.images[rows])
            assert torch.equal(ranks[rank][number].labels, batch.labels[rows])


def test_starting_at_any_batch_equals_going_there(raw_set):
    loader = make_loader(raw_set, horizontal_flip=True)
    sequence = take(loader, 14)
    for first in (1, 4, 5, 9):
        assert all(map(equal, take(loader, 3, first), sequence[first:]))


def test_flips_follow_the_plan_and_only_when_wanted(raw_set):
    for batch in take(make_loader(raw_set, horizontal_flip=True), 10):
        assert batch.flip.tolist() == flips(1, batch.number // 5, batch.sample_ids.numpy()).tolist()
    assert not any(batch.flip.any() for batch in take(make_loader(raw_set), 10))


def test_each_block_is_verified_once_an_epoch(tmp_path):
    shard_set = write_set(tmp_path / "set", [pixels.tobytes() for pixels in PIXELS[:40]])
    loader, num_blocks = make_loader(shard_set), shard_set.index.num_blocks
    take(loader, 5)
    assert loader.counts.blocks_verified == num_blocks == 10  # 4 + 4 in the shards of 16 samples, 2 in the one of 8
    assert (
        loader.counts.bytes_read == np.sum(shard_set.index.block_stop - shard_set.index.block_start) + 40 * SIZE**2 * 3
    )
    take(loader, 5, first=5)
    assert loader.counts.blocks_verified == 2 * num_blocks


def test_workers_change_nothing(raw_set):
    """Same batches as without workers, no draw from the global generator, and none left when the iterator is closed."""
    alone, state = take(make_loader(raw_set, horizontal_flip=True), 12), torch.get_rng_state()
    loader = make_loader(raw_set, horizontal_flip=True, num_workers=2)
    assert all(map(equal, take(loader, 12), alone))
    assert all(map(equal, take(loader, 3, first=7), alone[7:]))  # again from elsewhere: going back to a checkpoint
    assert torch.equal(state, torch.get_rng_state())
    assert multiprocessing.active_children() == []


def damage_payload(directory, index):
    flip_byte(directory / "shard-000001.tar", int(index.sample_offset[22]) + 5)


def damage_header(directory, index):
    flip_byte(directory / "shard-000001.tar", int(index.sample_offset[22]) - 400)


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut_shard(directory, index):
    path = directory / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[: int(index.block_start[5]) + 700])


def remove_shard(directory, index):
    (directory / "shard-000001.tar").unlink()


def replace_shard(directory, index):
    """By one of another build: right name and length, other content."""
    (directory / "shard-000001.tar").write_bytes((directory / "shard-000000.tar").read_bytes())


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_payload, r"is damaged: expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}"),
        (damage_header, r"is damaged: expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}"),
        (replace_shard, r"is damaged: expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}"),
        (cut_shard, r"cannot be read: .*expected \d+ bytes at .*, got 700: the file ends at byte \d+"),
        (remove_shard, r"cannot be read: .*shard-000001\.tar: not found"),
    ],
    ids=["payload", "header", "replaced", "cut", "missing"],
)
def test_damage_is_told_with_shard_block_and_way_out(raw_set, tmp_path, damage, told):
    damage(tmp_path / "set", raw_set.index)
    loader = make_loader(raw_set, batch=NUM_SAMPLES)  # one batch needs every block
    where = r"shard-000001\.tar: block \d+ \(bytes \d+ to \d+, samples \d+ to \d+\) "
    with pytest.raises(ShardSetError, match=f"{where}{told}.*; `python launch/shards.py verify .*/set` lists"):
        next(loader.batches())


def test_damage_between_epochs_is_told_in_the_next(raw_set, tmp_path):
    loader = make_loader(raw_set)
    take(loader, 5)
    damage_payload(tmp_path / "set", raw_set.index)
    with pytest.raises(ShardSetError, match="is damaged"):
        take(loader, 5, first=5)


def test_damage_seen_by_a_worker_is_told_in_its_words_after_the_good_batches(raw_set, tmp_path):
    damage_payload(tmp_path / "set", raw_set.index)
    good = 0
    with pytest.raises(ShardSetError) as told:
        for _ in make_loader(raw_set, num_workers=2).batches():
            good += 1
    alone = make_loader(raw_set).batches()
    for _ in range(good):
        next(alone)
    with pytest.raises(ShardSetError, match=re.escape(str(told.value))):  # word for word, no worker's traceback in it
        next(alone)


@pytest.mark.parametrize(
    ("encoding", "payload", "told"),
    [
        ("raw", b"1234", r"expected 192 bytes \(8 x 8 x 3\), got 4"),
        (
            "png",
            encode(np.zeros((9, 7, 3), np.uint8), "PNG"),
            r"expected 8 x 8 x 3 \(height, width, RGB\), got 9 x 7 x 3",
        ),
        ("png", encode(np.zeros((8, 8), np.uint8), "PNG"), r"expected 8 x 8 x 3 \(height, width, RGB\), got 8 x 8"),
        (
            "png",
            encode(np.zeros((8, 8, 3), np.uint8), "JPEG"),
            "expected a readable png image, got UnidentifiedImageError",
        ),
        ("webp", b"no image", "expected a readable webp image, got WebpError"),
        (
            "webp",
            encode(np.zeros((9, 7, 3), np.uint8), "WEBP", lossless=True),
            r"expected 8 x 8 x 3 \(.*\), got 9 x 7 x 3",
        ),
        (
            "webp",
            encode(np.zeros((8, 8, 4), np.uint8), "WEBP", lossless=True),
            r"expected 8 x 8 x 3 \(.*\), got 8 x 8 x 4",
        ),
        ("webp", encode(PIXELS[0], "WEBP", lossless=True)[:-9], "expected a readable webp image, got WebpError"),
        ("png", encode(PIXELS[0], "PNG")[:100], "expected a readable png image, got OSError"),
        ("original", b"no image", "no image"),
    ],
    ids=["short", "size", "grey", "format", "webp", "webp-size", "webp-alpha", "webp-cut", "cut", "original"],
)
def test_a_sample_that_is_not_what_the_set_says_is_named(tmp_path, encoding, payload, told):
    size = None if encoding == "original" else SIZE
    shard_set = write_set(tmp_path / "set", [payload] * 4, encoding, size)
    where = r"shard-000000\.tar: sample \d \(bytes \d+ to \d+\): "
    with pytest.raises(ShardSetError, match=f"{where}{told}.*; build or index the set again"):
        next(make_loader(shard_set, batch=4).batches())


def test_a_set_of_another_size_is_refused(raw_set):
    with pytest.raises(ValueError, match="holds images of 8 px, image_size=16 is wanted; build the set with --size 16"):
        make_loader(raw_set, image_size=16)


@pytest.mark.slow
def test_memory_of_a_worker_stays_bounded(tmp_path):
    """Batches of 12.6 MB once left holes in the heap that no later batch fitted."""
    pixels = np.random.default_rng(0).integers(0, 256, (512, 128, 128, 3), dtype=np.uint8)
    payloads, labels = [image.tobytes() for image in pixels], [sample % NUM_CLASSES for sample in range(512)]
    shard_set = write_set(tmp_path / "set", payloads, image_size=128, labels=labels, per_shard=512, per_block=78)
    batches = make_loader(shard_set, batch=256, image_size=128, num_workers=2).batches()
    for _ in range(120):
        next(batches)
    private_bytes = [psutil.Process(worker.pid).memory_full_info().uss for worker in multiprocessing.active_children()]
    batches.close()
    assert len(private_bytes) == 2
    assert max(private_bytes) < 150e6


TRAINER = """
import itertools, multiprocessing, signal, sys
from pipeline.loader import Loader
from pipeline.manifest import open_shard_set

if __name__ == "__main__":
    heard = []
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, lambda number, frame: heard.append(number))
    loader = Loader(open_shard_set(sys.argv[1]), image_size=8, seed=1, global_batch_size=8, num_workers=2)
    for batch in loader.batches():
        if batch.number % 50 == 0:
            print(batch.number, len(heard), *(child.pid for child in multiprocessing.active_children()), flush=True)
            sys.stdin.readline()
"""


@pytest.mark.slow
def test_workers_outlive_the_signals_of_the_job_and_not_the_trainer(raw_set, repo_root):
    """A scheduler signals every process of a job; the trainer may still need batches to finish its step and save."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, raw_set.location],
        cwd=repo_root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with trainer:
        _, _, *workers = map(int, trainer.stdout.readline().split())
        family = [trainer.pid, *(child.pid for child in psutil.Process(trainer.pid).children(recursive=True))]
        assert len(workers) == 2
        assert len(family) == 5  # trainer, resource tracker, fork server, two workers
        assert all(psutil.Process(worker).memory_full_info().uss < 300e6 for worker in workers)
        for name in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            for pid in family:
                psutil.Process(pid).send_signal(name)
            time.sleep(0.5)
            trainer.stdin.write("\n")
            trainer.stdin.flush()
            line = trainer.stdout.readline()
        assert list(map(int, line.split())) == [150, 3, *workers]
        trainer.kill()
        _, alive = psutil.wait_procs([psutil.Process(pid) for pid in family[1:] if psutil.pid_exists(pid)], timeout=20)
        assert alive == []
