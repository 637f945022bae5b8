import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config import ConfigError
from pipeline.features import frechet_distance
from pipeline.intra_class import ClassScore, check_classes, low_rank_fid, write_table


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


def test_a_class_that_cannot_be_scored_is_found_before_the_work():
    def check(num_classes: int, counts: tuple[int, ...]) -> None:
        config = SimpleNamespace(model=SimpleNamespace(num_classes=num_classes))
        manifest = SimpleNamespace(class_names=("cat", "dog", "owl"), class_counts=counts)
        check_classes(config, SimpleNamespace(manifest=manifest))

    check(3, (2, 2, 9))
    with pytest.raises(ConfigError, match=r"2 class\(es\) have fewer, the first dog"):
        check(3, (2, 1, 0))
    with pytest.raises(ConfigError, match="this model has none"):
        check(0, ())
