"""The order of samples: against a slow reference in plain Python, by its promises, and on ImageNet's shape."""

import itertools
import math
import time

import numpy as np
import pytest

from pipeline.order import Plan, _splitmix64, flips, rank_rows

# (samples per block, global batch, accumulation steps): even, uneven, fewer blocks than partitions, one block,
# blocks smaller than a partition's part of a batch, a batch with one partition, an epoch of one batch.
SHAPES = [
    ([50] * 40, 64, 1),
    ([7, 31, 1, 90, 12, 3] * 10, 32, 4),
    ([100, 20, 30], 64, 2),
    ([333], 16, 1),
    ([1] * 200, 128, 1),
    ([9, 8] * 10, 15, 5),
    ([65, 62], 64, 1),
]


def make_plan(counts, batch, accumulation=1, seed=3):
    return Plan(np.concatenate(([0], np.cumsum(counts))), seed, batch, accumulation)


@pytest.fixture(scope="module")
def imagenet():
    """First samples of the blocks of ImageNet's training set: shards of 2048 samples, at most 142 (4 MB) a block."""
    num_samples = 1_281_167
    shards = [*range(0, num_samples, 2048), num_samples]
    blocks = [np.arange(*shard, 142) for shard in itertools.pairwise(shards)]
    return np.concatenate([*blocks, [num_samples]])


def reference_splitmix64(state):
    mask = 2**64 - 1
    mixed = state = (state + 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31), state


def reference_epoch(counts, seed, batch, accumulation, epoch):
    """The rules of the order written down as loops: rows of the batches of one epoch, and what is left over."""

    def key(purpose, counter):
        state = 0
        for word in (seed, purpose, epoch):
            state = reference_splitmix64(state ^ word)[0]
        return reference_splitmix64((state + counter * 0x9E3779B97F4A7C15) % 2**64)[0]

    first = [sum(counts[:block]) for block in range(len(counts))]
    stream, borders = [], []
    for block in sorted(range(len(counts)), key=lambda block: key(0, block)):
        borders.append(len(stream))
        samples = range(first[block], first[block] + counts[block])
        stream += sorted(samples, key=lambda sample: (key(1, sample) >> 40, sample))
    partitions = math.gcd(64, batch // accumulation)
    part = batch // partitions
    length = len(stream) // batch * part
    lanes = []
    for begin in range(0, partitions * length, length):
        lane = stream[begin : begin + length]
        head = min([border - begin for border in borders if border >= begin], default=len(stream) - begin)
        lanes.append(lane[head:] + lane[:head] if head < part else lane)
    micro = part // accumulation
    rows = [
        [sample for step in range(accumulation) for lane in lanes for sample in lane[n + step * micro :][:micro]]
        for n in range(0, length, part)
    ]
    return rows, sorted(stream[partitions * length :])


def test_splitmix64_gives_the_published_numbers():
    # The first outputs for seed 1234567 of Vigna's splitmix64.c.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = np.uint64(1234567) + np.arange(4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert _splitmix64(states).tolist() == expected


@pytest.mark.parametrize(("counts", "batch", "accumulation"), SHAPES)
@pytest.mark.parametrize("epoch", [0, 5])
def test_order_equals_the_slow_reference(counts, batch, accumulation, epoch):
    plan = make_plan(counts, batch, accumulation)
    rows, left_over = reference_epoch(counts, 3, batch, accumulation, epoch)
    assert plan.epoch_sample_ids(epoch).tolist() == rows
    assert plan.left_over_sample_ids(epoch).tolist() == left_over


@pytest.mark.parametrize(("counts", "batch", "accumulation"), SHAPES)
def test_an_epoch_shows_each_sample_once_and_lists_the_rest(counts, batch, accumulation):
    plan = make_plan(counts, batch, accumulation)
    for epoch in range(3):
        shown, left_over = plan.epoch_sample_ids(epoch), plan.left_over_sample_ids(epoch)
        assert shown.shape == (sum(counts) // batch, batch)
        assert len(left_over) == sum(counts) % batch
        assert sorted([*shown.flatten().tolist(), *left_over.tolist()]) == list(range(sum(counts)))


def test_epochs_and_seeds_differ_in_order_and_in_what_is_left_over():
    plans = [make_plan([50] * 40, 64, seed=seed) for seed in (1, 2)]
    orders = {plan.epoch_sample_ids(epoch).tobytes() for plan in plans for epoch in (0, 1)}
    left_overs = {plan.left_over_sample_ids(epoch).tobytes() for plan in plans for epoch in (0, 1)}
    assert len(orders) == len(left_overs) == 4


@pytest.mark.parametrize(("counts", "batch", "accumulation"), SHAPES)
def test_any_batch_can_be_had_alone(counts, batch, accumulation):
    """Resume: batch number n needs nothing of the batches before it."""
    sequence = np.concatenate([make_plan(counts, batch, accumulation).epoch_sample_ids(epoch) for epoch in range(3)])
    for number in np.random.default_rng(0).permutation(len(sequence)):
        plan = make_plan(counts, batch, accumulation)
        assert np.array_equal(plan.batch_sample_ids(int(number)), sequence[number])


@pytest.mark.parametrize(("counts", "batch", "accumulation"), SHAPES)
def test_the_blocks_of_a_batch_are_those_of_its_samples(counts, batch, accumulation):
    plan = make_plan(counts, batch, accumulation)
    first_half = np.arange(batch // 2)
    for number in (0, 1, plan.batches_per_epoch):
        samples = plan.batch_sample_ids(number, first_half)
        blocks = {int(np.flatnonzero(plan.block_first_sample <= sample)[-1]) for sample in samples}
        assert plan.batch_blocks(number, first_half).tolist() == sorted(blocks)


def test_a_block_feeds_as_many_batches_as_its_partition_takes_samples_of_it():
    """256 of 64 partitions are 4 samples of each in a batch; 35 batches eat a block of 140."""
    assert make_plan([140] * 300, 256, 1).batches_per_block == 35


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 32, 96])
def test_ranks_together_give_the_global_batch(world_size, accumulation):
    """Per micro-batch, the rows of the ranks one after another are those of one process, for every world size."""
    plan = make_plan([37, 5, 160, 14] * 20, 384, accumulation)
    for number in (0, 7, plan.batches_per_epoch + 1):
        ranks = [
            plan.batch_sample_ids(number, rank_rows(384, accumulation, rank, world_size)).reshape(accumulation, -1)
            for rank in range(world_size)
        ]
        together = np.concatenate(ranks, axis=1)
        assert np.array_equal(together.reshape(-1), plan.batch_sample_ids(number))


def test_planning_is_immediate_on_imagenet(imagenet):
    """What a resume in the middle of epoch 100 costs a process."""
    started = time.process_time()
    Plan(imagenet, 0, 256).batch_sample_ids(100 * 5004 + 2500)
    assert time.process_time() - started < 0.2


def test_imagenet_on_1024_ranks(imagenet):
    started = time.process_time()
    plan = Plan(imagenet, 0, 1024)
    epoch = plan.epoch_sample_ids(0)
    ranks = [epoch[:, rank_rows(1024, 1, rank, 1024)] for rank in range(1024)]
    assert time.process_time() - started < 1
    shown = np.concatenate(ranks, axis=1)
    assert shown.shape == (1251, 1024)
    everything = np.sort(np.concatenate([shown.reshape(-1), plan.left_over_sample_ids(0)]))
    assert np.array_equal(everything, np.arange(1_281_167))


def test_nodes_share_the_reading_of_imagenet(imagenet):
    """An epoch costs the cluster the set about once, and the first batch waits for 64 blocks of 4 MB at most."""
    block_bytes = np.diff(imagenet) * 28_100  # so that a full block is 4 MB
    plan = Plan(imagenet, 0, 256)
    blocks = np.searchsorted(imagenet, plan.epoch_sample_ids(1), side="right") - 1
    for nodes in (1, 2, 4, 8, 64):
        of_node = [blocks[:, rank_rows(256, 1, node, nodes)] for node in range(nodes)]
        epoch_bytes = sum(block_bytes[np.unique(of)].sum() for of in of_node)
        assert epoch_bytes <= 1.02 * block_bytes.sum()
        assert max(block_bytes[np.unique(of[0])].sum() for of in of_node) <= 256e6 / nodes


def test_batches_mix_the_classes_of_a_permuted_set(imagenet):
    """Independent draws would show 225.8 of 1,000 classes in 256 samples."""
    labels = np.random.default_rng(0).permutation(np.arange(1_281_167) % 1000)
    batches = labels[Plan(imagenet, 0, 256).epoch_sample_ids(0)[::10]]
    assert np.mean([len(np.unique(batch)) for batch in batches]) >= 224


def test_flips_are_fair_and_differ_between_epochs_and_samples():
    samples = np.arange(100_000)
    epochs = [flips(7, epoch, samples) for epoch in range(4)]
    for index, flip in enumerate(epochs):
        assert abs(flip.mean() - 0.5) < 0.01  # six standard deviations
        for other in epochs[:index]:
            assert abs((flip == other).mean() - 0.5) < 0.01
    assert abs((epochs[0][1:] == epochs[0][:-1]).mean() - 0.5) < 0.01


def test_a_flip_belongs_to_its_sample():
    """Whichever rank asks, in whatever order."""
    samples = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(flips(7, 2, samples), flips(7, 2, np.arange(1000))[samples])


def test_a_set_smaller_than_the_batch_is_refused():
    with pytest.raises(ValueError, match="the set has 30 samples, fewer than global_batch_size=64"):
        make_plan([10, 20], 64)


def test_a_batch_that_cannot_be_accumulated_is_refused():
    with pytest.raises(ValueError, match="global_batch_size=64 must be a multiple of accumulation_steps=3"):
        make_plan([100], 64, 3)


def test_processes_that_cannot_share_a_micro_batch_are_refused():
    with pytest.raises(ValueError, match=r"6 processes cannot share .* 256 / 2 = 128 .*: start 2 or 4 or 8 processes"):
        rank_rows(256, 2, 0, 6)
