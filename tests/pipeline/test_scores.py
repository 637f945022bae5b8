import pytest
from torch import nn

from pipeline.config import EvaluationConfig
from pipeline.features import EvaluationError, Extractor
from pipeline.scores import check_counts, score_names


@pytest.mark.parametrize(
    ("kind", "num_images", "complete", "fid", "ending", "num_reasons"),
    [
        ("official", 50_000, True, "fid", "", 0),
        ("official", 10_000, True, "fid_10k", "_10k", 1),
        ("official", 5_000, True, "fid_5k", "_5k", 1),
        ("official", 1_234, True, "fid_1234", "_1234", 1),
        ("official", 100_000, True, "fid_100k", "_100k", 1),
        ("official", 50_000, False, "fid_partial_reference", "", 1),
        ("official", 10_000, False, "fid_10k_partial_reference", "_10k", 2),
        ("unofficial", 50_000, True, "fid_unofficial", "_unofficial", 1),
        ("unofficial", 1_000, False, "fid_unofficial", "_unofficial", 3),
        ("random", 50_000, True, "fid_random_features", "_random_features", 1),
        ("own", 50_000, True, "fid_dino", "_dino", 1),
        ("random", 1_000, True, "fid_random_features", "_random_features", 2),
    ],
)
def test_only_the_official_protocol_is_called_fid(kind, num_images, complete, fid, ending, num_reasons):
    extractor = Extractor("dino", "0" * 64, kind, 2, nn.Identity())
    fid_ending, found_ending, reasons = score_names(extractor, EvaluationConfig(), num_images, complete)
    assert (f"fid{fid_ending}", found_ending, len(reasons)) == (fid, ending, num_reasons)


@pytest.mark.parametrize(
    ("choice", "fid"),
    [
        ({"weights": "raw"}, "fid_raw"),
        ({"batch_norm": "standing"}, "fid_standing"),
        ({"batch_norm": "batch"}, "fid_batch_statistics"),
        ({"labels": "balanced"}, "fid_balanced"),
        ({"weights": "raw", "batch_norm": "batch"}, "fid_raw_batch_statistics"),
    ],
)
def test_another_generator_state_has_a_name_of_its_own(choice, fid):
    extractor = Extractor("inception-v3-compat", "0" * 64, "official", 2, nn.Identity())
    ending, inception_ending, reasons = score_names(extractor, EvaluationConfig(**choice), 50_000, True)
    assert f"fid{ending}" == fid
    assert inception_ending == ending
    assert len(reasons) == len(choice)


def test_too_few_images_for_kid_is_found_before_the_first_sample():
    with pytest.raises(EvaluationError, match=r"kid_subset_size=1000 images, but there are only 999 samples"):
        check_counts(EvaluationConfig(), 999, 5000)
    check_counts(EvaluationConfig(), 1000, 1000)
    check_counts(EvaluationConfig(metrics=("fid",)), 10, 10)
