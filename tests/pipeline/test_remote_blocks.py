"""Samples of a set in a real Ceph RGW: those of the local set, through damage, faults and several processes."""

import multiprocessing
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import s3, s3_store, shards
from pipeline.block_cache import BlockCache
from pipeline.blocks import MAX_FETCHES, Blocks
from pipeline.loader import AHEAD_BLOCKS, Loader
from pipeline.manifest import ShardSetError, open_shard_set
from pipeline.order import rank_rows
from pipeline.read_counts import ReadCounts
from pipeline.sources import list_source

pytestmark = pytest.mark.s3


@pytest.fixture
def local(set_of_40_blocks):
    return set_of_40_blocks


@pytest.fixture
def remote(local, s3_bucket):
    """Location of the same set in the store."""
    location = s3_bucket()
    for name in [*(shard.name for shard in local.manifest.shards), "index.safetensors", "manifest.json"]:
        put(location, name, open_bytes(local, name))
    return location


@pytest.fixture
def cache(tmp_path):
    return BlockCache(str(tmp_path / "cache"))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(s3, "_pause_seconds", lambda failures: 0.01)
    monkeypatch.setattr(s3_store, "READ_TIMEOUT_SECONDS", 0.5)


def open_bytes(local, name):
    with open(f"{local.location}/{name}", "rb") as file:
        return file.read()


def put(location, name, data):
    where = s3_store.parse(location)
    s3_store.client(where).put_object(Bucket=where.bucket, Key=where.key(name), Body=data)


def read_epoch(blocks, epoch=0, seed=0, batch=16):
    """All samples in a random order, in batches; the images by sample id, and what it cost."""
    ids = np.random.default_rng(seed).permutation(240)
    images, counts = {}, ReadCounts()
    for first in range(0, 240, batch):
        found, cost = blocks.read(ids[first : first + batch], epoch)
        counts += cost
        assert not images.keys() & set(ids[first : first + batch].tolist())
        images |= zip(ids[first : first + batch].tolist(), found, strict=True)
    return images, counts


def test_samples_are_those_of_the_local_set_and_each_block_comes_once(local, remote, cache):
    shard_set = open_shard_set(remote)
    assert shard_set.dataset_id == local.dataset_id
    blocks, (expected, _) = Blocks(shard_set, cache), read_epoch(Blocks(local))
    images, counts = read_epoch(blocks)
    assert images == expected
    total = int(np.sum(local.index.block_stop - local.index.block_start))
    assert (counts.requests, counts.blocks_fetched, counts.cache_misses, counts.bytes_fetched) == (40, 40, 40, total)
    assert counts.blocks_verified == 80 and counts.cache_hits > 100  # as they came, and as they were read
    images, counts = read_epoch(blocks, epoch=1, seed=1)
    assert images == expected and (counts.requests, counts.blocks_fetched, counts.blocks_verified) == (0, 0, 40)


def test_another_set_of_the_same_names_does_not_answer_from_the_cache(local, remote, cache, s3_bucket, tmp_path):
    """Stock caches that go by file name give training images for a validation set."""
    tree = Path(local.location).parent / "tree"
    plan = shards.plan(list_source(tree), image_size=16, encoding="raw", samples_per_shard=60, seed=9)
    (tmp_path / "other").mkdir()
    other = shards.build(plan, tmp_path / "other").shard_set
    location = s3_bucket()
    for path in (tmp_path / "other").iterdir():
        put(location, path.name, path.read_bytes())
    read_epoch(Blocks(open_shard_set(remote), cache))
    images, _ = read_epoch(Blocks(open_shard_set(location), cache))
    assert images == read_epoch(Blocks(other))[0] != read_epoch(Blocks(local))[0]


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_a_damaged_cached_block_is_fetched_again(local, remote, cache, damage):
    shard_set = open_shard_set(remote)
    expected, _ = read_epoch(Blocks(shard_set, cache))
    path = cache.path / local.index.block_sha256[7].tobytes().hex()
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes({"bit": data, "cut": data[:700], "empty": b""}[damage])
    images, counts = read_epoch(Blocks(shard_set, cache))
    assert images == expected and (counts.bad_blocks, counts.cache_misses, counts.requests) == (1, 1, 1)
    assert read_epoch(Blocks(shard_set, cache))[1].bad_blocks == 0


def test_a_cached_block_cut_after_it_was_verified_is_fetched_again(local, remote, cache):
    blocks = Blocks(open_shard_set(remote), cache)
    expected, _ = read_epoch(blocks)
    (cache.path / local.index.block_sha256[7].tobytes().hex()).write_bytes(b"")
    images, counts = read_epoch(blocks)
    assert images == expected and (counts.bad_blocks, counts.cache_misses) == (1, 1)


def test_a_damaged_shard_names_shard_block_expected_and_got(local, remote, cache):
    name, index = local.manifest.shards[1].name, local.index
    block = int(np.flatnonzero(index.block_shard == 1)[2])
    data = bytearray(open_bytes(local, name))
    data[int(index.block_start[block]) + 600] ^= 1
    put(remote, name, bytes(data))
    blocks = Blocks(open_shard_set(remote), cache)
    first = int(index.block_first_sample[block])
    with pytest.raises(ShardSetError) as caught:
        blocks.read(np.array([first]), 0)
    message = str(caught.value)
    assert f"/set/{name}: block {block} (bytes {index.block_start[block]} to {index.block_stop[block]}" in message
    assert re.search(
        rf"expected sha256 {index.block_sha256[block].tobytes().hex()}, got [0-9a-f]{{64}}, 4 times", message
    )
    assert "launch/shards.py verify" in message and MAX_FETCHES == 4
    assert blocks.read(np.array([first - 1]), 0)[1].cache_misses == 1  # the block before it is sound


@pytest.mark.parametrize("fault", ["missing", "cut"])
def test_a_missing_or_cut_shard_is_named(local, remote, cache, fault):
    name, where = local.manifest.shards[1].name, s3_store.parse(remote)
    if fault == "missing":
        s3_store.client(where).delete_object(Bucket=where.bucket, Key=where.key(name))
        expected = "cannot be read: .*not found; check"
    else:
        put(remote, name, open_bytes(local, name)[:-20_000])
        expected = r"cannot be read: .*(got \d+: the object ends at byte|the object ends before it)"
    last = int(np.flatnonzero(local.index.sample_shard == 1)[-1])
    with pytest.raises(ShardSetError, match=expected):
        Blocks(open_shard_set(remote), cache).read(np.array([last]), 0)


def test_four_processes_fetch_each_block_once(local, remote, cache):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.starmap_async(_read_all, [(remote, cache, seed) for seed in range(4)]).get(60)
    expected, _ = read_epoch(Blocks(local))
    assert all(images == expected for images, _ in results)
    assert sum((counts for _, counts in results), ReadCounts()).requests == 40


def _read_all(location, cache, seed):
    return read_epoch(Blocks(open_shard_set(location), cache), seed=seed)


def test_a_cache_smaller_than_the_set_stays_within_its_bound(local, remote, tmp_path):
    small = BlockCache(str(tmp_path / "small"), 200_000)
    blocks = Blocks(open_shard_set(remote), small)
    expected, _ = read_epoch(Blocks(local))
    images, counts = read_epoch(blocks, batch=60)
    assert images == expected and counts.cache_misses > 40
    assert sum(path.stat().st_size for path in small.path.iterdir() if len(path.name) == 64) <= 200_000


@pytest.mark.slow
def test_an_epoch_through_200_faults_gives_every_sample_once(local, remote, cache, fault_proxy, quick):
    rng = random.Random(11)

    def faults():
        for number in range(200):
            kind = rng.choice(["reset"] * 3 + ["close"] * 3 + ["busy"] * 2 + ["stall"])
            if number % 3 == 2:
                yield "close", 40_000  # after two blocks: nine faults in a row that bring nothing are an error
            elif kind == "busy":
                yield rng.choice([(503, "SlowDown"), (500, "InternalError")])
            else:
                yield kind, rng.randrange(300 if rng.random() < 0.1 else 60_000)  # over the blocks of a connection
        while True:
            yield None

    shard_set = open_shard_set(remote)
    through, proxy = fault_proxy(remote, faults())
    expected, _ = read_epoch(Blocks(shard_set, cache))
    counts, epoch = ReadCounts(), 0
    while proxy.faults < 200:  # without a cache left from the epoch before
        for path in cache.path.iterdir():
            path.unlink()
        images, cost = read_epoch(Blocks(open_shard_set(through), cache), epoch)
        assert images == expected and cost.bad_blocks == 0
        counts, epoch = counts + cost, epoch + 1
    assert counts.retries > 100


def test_batches_of_a_remote_set_are_those_of_the_local_one(local, remote, cache):
    options = {"image_size": 16, "seed": 3, "global_batch_size": 24, "num_workers": 2, "horizontal_flip": True}
    there = Loader(open_shard_set(remote), cache=cache, **options)
    here = Loader(local, **options)
    for batch, expected, _ in zip(there.batches(), here.batches(), range(12), strict=False):
        assert all(torch.equal(*pair) for pair in zip(batch[:4], expected[:4], strict=True))
    assert there.counts.blocks_fetched == there.counts.requests == 40 and there.counts.bytes_fetched > 0


def test_blocks_fetched_ahead_are_there_when_they_are_needed(local, remote, cache):
    blocks = Blocks(open_shard_set(remote), cache)
    blocks.fetch_ahead(frozenset(range(12)))
    deadline = time.monotonic() + 30
    while not all(cache.holds(local.index.block_sha256[block].tobytes().hex()) for block in range(12)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    blocks.read(np.array([0]), 0)
    blocks.fetch_ahead(frozenset(range(6, 14)))  # of which two are new
    images, counts = blocks.read(np.arange(int(local.index.block_first_sample[14])), 0)
    assert counts.cache_hits >= 12 and counts.cache_hits + counts.cache_misses == 14
    assert images == Blocks(local).read(np.arange(len(images)), 0)[0]


def test_what_went_wrong_ahead_of_use_is_raised_when_the_block_is_needed(local, remote, cache):
    name, where = local.manifest.shards[1].name, s3_store.parse(remote)
    block = int(np.flatnonzero(local.index.block_shard == 1)[0])
    first = int(local.index.block_first_sample[block])
    s3_store.client(where).delete_object(Bucket=where.bucket, Key=where.key(name))
    blocks = Blocks(open_shard_set(remote), cache)
    blocks.fetch_ahead(frozenset([block]))
    assert len(blocks.read(np.array([first - 1]), 0)[0]) == 1
    with pytest.raises(ShardSetError, match=f"{name}: block {block} .* cannot be read: .*not found"):
        blocks.read(np.array([first]), 0)


def test_a_loader_asks_for_its_blocks_ahead_and_for_no_others(local, remote, cache):
    """Two ranks on two nodes: what each fetches in an epoch, ahead or not, is about its half of the set."""
    fetched = []
    for rank in range(2):
        own = BlockCache(f"{cache.directory}-{rank}", cache.max_bytes)
        loader = Loader(
            open_shard_set(remote), image_size=16, seed=3, global_batch_size=8, rank=rank, world_size=2, cache=own
        )
        batches = loader.batches()
        next(batches)
        wanted = {
            int(block)
            for number in range(AHEAD_BLOCKS * loader.plan.batches_per_block + 1)
            for block in loader.plan.batch_blocks(number, rank_rows(8, 1, rank, 2))
        }
        deadline = time.monotonic() + 30
        while sum(len(path.name) == 64 for path in own.path.iterdir()) < len(wanted):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        batches.close()
        held = {path.name for path in own.path.iterdir() if len(path.name) == 64}
        assert held == {local.index.block_sha256[block].tobytes().hex() for block in wanted}
        fetched.append(wanted)
    assert len(fetched[0] & fetched[1]) <= 1


def test_a_failure_in_a_worker_reaches_the_training_loop(local, remote, cache):
    name, where = local.manifest.shards[1].name, s3_store.parse(remote)
    s3_store.client(where).delete_object(Bucket=where.bucket, Key=where.key(name))
    loader = Loader(open_shard_set(remote), image_size=16, seed=3, global_batch_size=24, num_workers=2, cache=cache)
    with pytest.raises(ShardSetError, match=f"{name}: block .* cannot be read: .*not found"):
        for _ in zip(loader.batches(), range(10), strict=False):
            pass


def test_a_cache_that_would_fetch_blocks_again_and_again_is_refused(remote, tmp_path):
    """4 partitions with a block in use, 4 ahead and one to come, of 15,360 bytes."""
    options = {"image_size": 16, "seed": 3, "global_batch_size": 4}
    with pytest.raises(ValueError, match=r"data.cache_bytes=368639 is too small .*set data.cache_bytes to 368640"):
        Loader(open_shard_set(remote), cache=BlockCache(str(tmp_path), 368_639), **options)
    Loader(open_shard_set(remote), cache=BlockCache(str(tmp_path), 368_640), **options)
