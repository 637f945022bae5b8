"""The cache of blocks on the local disk, as several processes use it and die in it."""

import errno
import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.block_cache import BlockCache

FORK = multiprocessing.get_context("fork")


def block(number: int, size: int = 1000) -> tuple[str, bytes]:
    data = number.to_bytes(4, "big") * (size // 4)
    return hashlib.sha256(data).hexdigest(), data


def add(cache, number, size=1000):
    sha256, data = block(number, size)
    with cache.fetching(sha256):
        cache.add(sha256, data)
    os.utime(cache.path / sha256, ns=(number, number))  # the higher the number, the later used


def held(cache):
    """Numbers of the blocks on the disk."""
    return sorted(int.from_bytes(path.read_bytes()[:4], "big") for path in cache.path.iterdir() if len(path.name) == 64)


def read(cache, number):
    with cache.open(block(number)[0]) as file:
        return file and file.read()


@pytest.fixture
def cache(tmp_path) -> BlockCache:
    return BlockCache(str(tmp_path / "cache"), 8000)


def test_gives_back_what_was_added(cache):
    assert read(cache, 1) is None
    add(cache, 1)
    assert read(cache, 1) == block(1)[1] and read(cache, 2) is None
    cache.discard(block(1)[0])
    assert read(cache, 1) is None and held(cache) == []


def test_the_default_directory_is_this_users(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert BlockCache().path == tmp_path / f"sagan-blocks-{os.getuid()}"
    add(BlockCache(), 1)
    assert BlockCache().path.stat().st_mode & 0o777 == 0o700


def test_the_least_recently_used_go_and_the_bound_holds(cache):
    for number in range(1, 9):
        add(cache, number)
    assert held(cache) == list(range(1, 9))
    assert read(cache, 1)  # used again
    add(cache, 9)
    assert held(cache) == [1, 4, 5, 6, 7, 8, 9]  # to 7/8 of the room that is wanted, so that it comes seldom
    for number in range(10, 60):
        add(cache, number)
        assert len(held(cache)) <= 8


def test_what_is_being_read_is_not_evicted(cache):
    for number in range(1, 9):
        add(cache, number)
    with cache.open(block(1)[0]) as oldest:
        os.utime(cache.path / block(1)[0], ns=(1, 1))
        add(cache, 9)
        assert 1 in held(cache) and 2 not in held(cache)
        assert oldest.read() == block(1)[1]


def test_a_block_for_which_there_is_no_room_is_not_kept(cache):
    add_alone = BlockCache(cache.directory, 1500)
    add(add_alone, 1)
    with add_alone.open(block(1)[0]):
        with add_alone.fetching(block(2)[0]):
            add_alone.add(*block(2))
        assert held(cache) == [1]  # all that is here is in use
    with add_alone.fetching(block(3, 2000)[0]):
        add_alone.add(*block(3, 2000))
    assert held(cache) == [1]  # it is larger than the cache, for which nothing is evicted


def test_a_full_disk_names_the_keys(cache, monkeypatch):
    add(cache, 1)

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        OSError, match=r"cache: No space left on device at 1,000 of data.cache_bytes=8000.*data.cache_dir"
    ):
        add(cache, 2)
    monkeypatch.undo()
    add(cache, 3)
    assert held(cache) == [1, 3]


@pytest.mark.parametrize("total", ["", "nonsense", "999999"])
def test_a_total_that_a_kill_left_wrong_is_mended(cache, total):
    for number in range(1, 9):
        add(cache, number)
    (cache.path / "total").write_text(total)
    (cache.path / "new.part").write_bytes(b"half")
    for number in range(9, 40):
        add(cache, number)
        assert 5 <= len(held(cache)) <= 8
    assert not (cache.path / "new.part").exists()


def test_one_process_fetches_and_the_others_wait(cache):
    with FORK.Pool(4) as pool:
        fetched = pool.map(_read_or_fetch, [cache] * 4)
    assert sorted(fetched) == [False, False, False, True]


def _read_or_fetch(cache):
    sha256, data = block(1)
    with cache.fetching(sha256):
        with cache.open(sha256) as file:
            if file:
                assert file.read() == data
                return False
        time.sleep(0.3)  # the fetch
        cache.add(sha256, data)
        return True


def test_a_killed_process_leaves_no_lock(cache):
    """SIGKILL while it fetches, while it reads, and while it holds the total."""
    add(cache, 1)
    ready = FORK.Event()
    process = FORK.Process(target=_hold_all, args=(cache, ready))
    process.start()
    assert ready.wait(20)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    begin = time.monotonic()
    add(cache, 1)
    for number in range(2, 30):
        add(cache, number)
    assert time.monotonic() - begin < 10 and 1 not in held(cache)


def _hold_all(cache, ready):
    sha256 = block(1)[0]
    with cache.fetching(sha256), cache.open(sha256), cache._total():
        ready.set()
        time.sleep(60)


def test_processes_killed_at_random_places_leave_whole_blocks_within_the_bound(cache):
    for kill in range(12):
        ready = FORK.Event()
        process = FORK.Process(target=_churn, args=(cache, kill, ready))
        process.start()
        assert ready.wait(20)
        time.sleep(0.013 * (kill % 5))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        files = [path for path in cache.path.iterdir() if len(path.name) == 64]
        assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in files)
        assert sum(path.stat().st_size for path in files) <= cache.max_bytes


def _churn(cache, start, ready):
    for number in range(start * 100_000, start * 100_000 + 99_999):
        add(cache, number)
        ready.set()
