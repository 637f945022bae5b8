import torch

from pipeline.steps import _D_NUMBERS, _numbers


def test_signs_of_collapse_by_hand():
    """Two equal real images; two fakes, black and white, that lie 1 from their mean at each pixel."""
    real = torch.full((2, 3, 4, 4), 0.3)
    fake = torch.stack([torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), 1.0)])
    found = _numbers(torch.tensor(2.5), torch.tensor([1.0, 4.0]), torch.tensor([-1.0, -1.0]), torch.cat([real, fake]))
    assert dict(zip(_D_NUMBERS, found.tolist(), strict=True)) == {
        "d_loss": 2.5, "real_logits": 2.5, "fake_logits": -1.0, "real_logits_std": 1.5, "fake_logits_std": 0.0,
        "real_pixel_std": 0.0, "fake_pixel_std": 1.0,
    }  # fmt: skip
