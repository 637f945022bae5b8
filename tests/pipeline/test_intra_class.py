import csv

import numpy as np
import pytest
import torch

from pipeline.features import frechet_distance
from pipeline.intra_class import ClassScore, low_rank_fid, write_table


@pytest.mark.parametrize(("num_fakes", "num_reals"), [(30, 40), (5, 40), (30, 7), (6, 4)])
def test_the_low_rank_form_is_fid(num_fakes, num_reals):
    """Against torch-fidelity's own, with more and with fewer images than the 12 features."""
    generator = torch.Generator().manual_seed(num_fakes)
    fakes = torch.randn(num_fakes, 12, generator=generator, dtype=torch.float64)
    reals = 2 * torch.randn(num_reals, 12, generator=generator, dtype=torch.float64) + 1
    statistics = [
        statistic for rows in (fakes, reals) for statistic in (rows.mean(0).numpy(), np.cov(rows.numpy(), rowvar=False))
    ]
    # torch-fidelity takes roots of the noise around zero eigenvalues where a covariance has not full rank.
    tolerance = 1e-10 if min(num_fakes, num_reals) > 12 else 1e-5
    assert low_rank_fid(fakes, reals) == pytest.approx(frechet_distance(*statistics), rel=tolerance)


def test_the_worst_class_comes_first(tmp_path):
    write_table(tmp_path / "classes.csv", [ClassScore(0, 9, 1.0), ClassScore(1, 8, 2.5)], ("cat", "dog, wet"))
    rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    assert [(row["label"], row["name"], row["fid"]) for row in rows] == [
        ("1", "dog, wet", "2.500000"),
        ("0", "cat", "1.000000"),
    ]
