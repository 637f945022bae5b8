import sys

import pytest
import torch
from torch import nn

from pipeline.features import EvaluationError
from pipeline.own_extractor import open_own

CPU = torch.device("cpu")
MODULE = """
import torch
from torch import nn

class Means(nn.Module):
    def forward(self, images):
        means = images.float().mean((2, 3))
        return means, means.repeat(1, 2)

def good():
    return Means()

def no_network():
    return 3

def integers():
    return nn.Flatten()
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    (tmp_path / "our_features.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "our_features"
    sys.modules.pop("our_features", None)


def test_a_function_of_ones_own(module):
    extractor = open_own(f"{module}:good", 16, CPU)
    assert (extractor.name, extractor.kind, extractor.num_features) == ("our_features_good", "own", 3)
    features, logits = extractor(torch.full((4, 3, 16, 16), 7, dtype=torch.uint8))
    assert torch.equal(features, torch.full((4, 3), 7.0))
    assert logits.shape == (4, 6)


class Pool(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's, of torch.jit.script
def test_a_torchscript_file_without_logits(tmp_path):
    torch.jit.script(Pool()).save(str(tmp_path / "Face-Net.pt"))
    extractor = open_own(str(tmp_path / "Face-Net.pt"), 16, CPU)
    assert (extractor.name, extractor.num_features) == ("face_net", 3)
    assert extractor(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))[1] is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("absent", "cannot be imported"),
        ("no_network", "must return an nn.Module, got int"),
        ("integers", r"must map \(N, 3, H, W\) uint8 to \(N, D\) float32 features.*gave \(2, 768\) torch.uint8"),
    ],
)
def test_what_is_no_extractor_is_refused(module, function, message):
    with pytest.raises(EvaluationError, match=message):
        open_own(f"{module}:{function}", 16, CPU)


@pytest.mark.parametrize("content", [None, b"no TorchScript"])
def test_a_file_that_is_no_torchscript(tmp_path, content):
    if content:
        (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(EvaluationError, match="is no TorchScript file"):
        open_own(str(tmp_path / "x.pt"), 16, CPU)


def test_another_text_of_the_module_is_another_extractor(module, tmp_path):
    """What it does to images is part of what it is, not only its weights."""
    before = open_own(f"{module}:good", 16, CPU)
    (tmp_path / "our_features.py").write_text(MODULE.replace("images.float()", "(images.float() / 255)"))
    sys.modules.pop(module)
    assert open_own(f"{module}:good", 16, CPU).sha256 != before.sha256


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's, of torch.jit.script
@pytest.mark.parametrize("name", ["10k", "validation", "unofficial"])
def test_a_name_that_means_something_else_in_scores_is_refused(tmp_path, name):
    torch.jit.script(Pool()).save(str(tmp_path / f"{name}.pt"))
    with pytest.raises(EvaluationError, match=f"would call its scores fid_{name}, which means something else; rename"):
        open_own(str(tmp_path / f"{name}.pt"), 16, CPU)
