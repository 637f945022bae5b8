import math

import pytest
import torch

from pipeline.noise import draw_labels, draw_truncated_z, draw_z, rank_micro_batches


def test_noise_is_a_function_of_what_it_is_for():
    z = draw_z(0, "d_z", 7, 1, 64, 16)
    assert torch.equal(z, draw_z(0, "d_z", 7, 1, 64, 16))
    others = [(1, "d_z", 7, 1), (0, "g_z", 7, 1), (0, "d_z", 8, 1), (0, "d_z", 7, 2)]
    for arguments in others:
        assert not torch.equal(z, draw_z(*arguments, 64, 16))


def test_noise_is_standard_normal_and_labels_are_uniform():
    z = draw_z(3, "g_z", 0, 0, 20_000, 8)
    assert abs(float(z.mean())) < 0.01
    assert abs(float(z.std()) - 1) < 0.01
    labels = draw_labels(3, "g_labels", 0, 0, 100_000, 10)
    counts = torch.bincount(labels, minlength=10).double()
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9  # chi-square with 9 degrees of freedom, p = 0.001


def test_an_unconditional_model_has_no_labels():
    assert draw_labels(0, "g_labels", 0, 0, 4, 0) is None


def test_micro_batches_are_cut_before_ranks():
    # 8 rows, 2 micro-batches (0-3 and 4-7), 2 ranks: rank 1 holds the second half of each.
    rows = torch.arange(8)
    assert [part.tolist() for part in rank_micro_batches(rows, 2, 1, 2)] == [[2, 3], [6, 7]]


def test_a_micro_batch_holds_the_same_rows_for_every_world_size():
    rows = torch.arange(48).reshape(24, 2)
    for world_size in (1, 2, 3, 4, 6, 12):
        parts = [rank_micro_batches(rows, 2, rank, world_size) for rank in range(world_size)]
        for index, expected in enumerate(rows.chunk(2)):
            assert torch.equal(torch.cat([part[index] for part in parts]), expected)


def test_truncated_noise_is_a_normal_distribution_within_its_threshold():
    """Mean square of a normal given |z| < t: 1 - 2 t phi(t) / (2 Phi(t) - 1)."""
    for threshold in (0.5, 2.0, 40.0):
        z = draw_truncated_z(0, "eval_z", 0, 0, 2000, 50, threshold)
        assert z.abs().max() <= threshold
        inside = math.erf(threshold / 2**0.5)
        density = math.exp(-(threshold**2) / 2) / (2 * math.pi) ** 0.5
        assert z.square().mean().item() == pytest.approx(1 - 2 * threshold * density / inside, rel=0.02)
        assert z.mean().item() == pytest.approx(0, abs=0.02)
