"""Spectral norm, batch norm, attention and their helpers, each against torch or a formula written out."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sagan.layers import (
    ConditionalBatchNorm2d,
    CrossReplicaBatchNorm2d,
    SelfAttention,
    SNConv2d,
    SNEmbedding,
    SNLinear,
    SpectralNorm,
    advance_spectral_norm,
    attention_gains,
    attention_place,
    check_labels,
    initialize,
    spectral_norms,
)

LAYERS = {
    "conv3x3": lambda: SNConv2d(6, 10, 3),
    "conv1x1": lambda: SNConv2d(6, 10, 1, bias=False),
    "linear": lambda: SNLinear(7, 12),
    "embedding": lambda: SNEmbedding(9, 5),
}


def make(name: str) -> SpectralNorm:
    torch.manual_seed(0)
    layer: SpectralNorm = LAYERS[name]().double()
    return layer


def torch_twin(layer: SpectralNorm) -> nn.Module:
    """The plain torch layer of the same weight under torch's own spectral norm, with the same u and v."""
    twin: nn.Module
    if isinstance(layer, SNConv2d):
        twin = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            padding=layer.padding,
            bias=layer.bias is not None,
        )
    elif isinstance(layer, SNLinear):
        twin = nn.Linear(layer.in_features, layer.out_features)
    else:
        assert isinstance(layer, SNEmbedding)
        twin = nn.Embedding(layer.num_embeddings, layer.embedding_dim)
    twin.to(layer.weight.dtype)
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    parametrizations.spectral_norm(twin, eps=layer.eps)
    twin.parametrizations.weight[0]._u.copy_(layer.u)
    twin.parametrizations.weight[0]._v.copy_(layer.v)
    return twin


def example_input(name: str) -> Tensor:
    shapes = {"conv3x3": (2, 6, 5, 5), "conv1x1": (2, 6, 5, 5), "linear": (4, 7)}
    return torch.tensor([0, 3, 8, 3]) if name == "embedding" else torch.randn(shapes[name], dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_spectral_norm_follows_torch_step_by_step(name: str) -> None:
    # torch iterates in its forward pass in train mode, we in advance_spectral_norm just before.
    layer = make(name)
    twin = torch_twin(layer)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in (layer, twin)]
    x = example_input(name)
    for _ in range(4):
        advance_spectral_norm(layer)
        outputs = [layer(x), twin(x)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-13)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().sum().backward()
        original = twin.parametrizations.weight.original
        torch.testing.assert_close(layer.weight.grad, original.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.u, twin.parametrizations.weight[0]._u, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(layer.v, twin.parametrizations.weight[0]._v, rtol=1e-12, atol=1e-13)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("name", LAYERS)
def test_converged_weight_has_singular_value_one(name: str) -> None:
    layer = make(name)
    for _ in range(300):
        advance_spectral_norm(layer)
    largest = torch.linalg.svdvals(layer.normalized_weight().detach().flatten(1))[0].item()
    assert largest == pytest.approx(1, abs=1e-6)
    sigma = torch.linalg.svdvals(layer.weight.detach().flatten(1))[0]
    torch.testing.assert_close(layer.normalized_weight(), layer.weight / sigma, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_a_new_layer_is_close_to_the_bound_at_once(name: str) -> None:
    # Without starting iterations u^T W v may be near 0 and the first weights huge.
    largest = torch.linalg.svdvals(make(name).normalized_weight().detach().flatten(1))[0].item()
    assert 0.99 < largest < 1.1


def operator_norm(kernel: Tensor, size: int) -> float:
    """Largest singular value of the zero-padded convolution on size x size maps, by power iteration on the map."""
    padding = kernel.shape[-1] // 2
    x = torch.rand(1, kernel.shape[1], size, size, dtype=kernel.dtype)
    for _ in range(500):
        x = F.conv_transpose2d(F.conv2d(x, kernel, padding=padding), kernel, padding=padding)
        x /= x.norm()
    return F.conv2d(x, kernel, padding=padding).norm().item()


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_operator_norm_of_a_convolution_is_at_most_its_kernel_size(kernel_size: int, kind: str) -> None:
    torch.manual_seed(0)
    conv = SNConv2d(3, 4, kernel_size, bias=False).double()
    if kind == "smooth":
        nn.init.constant_(conv.weight, 0.1)
    for _ in range(300):
        advance_spectral_norm(conv)
    norm = operator_norm(conv.normalized_weight().detach(), size=24)
    assert norm <= kernel_size * (1 + 1e-3)
    if kernel_size > 1 and kind == "smooth":
        assert norm > 0.9 * kernel_size  # the bound is sharp: the matrix norm 1 does not bound the operator


def test_backward_after_advance_uses_the_vectors_of_its_forward() -> None:
    layer, frozen = make("linear"), make("linear")
    x = example_input("linear")
    loss = layer(x).square().sum()
    advance_spectral_norm(layer)
    loss.backward()
    frozen(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, frozen.weight.grad)


def test_spectral_norm_stays_float32_under_autocast() -> None:
    torch.manual_seed(0)
    layer = SNLinear(64, 64)
    inside = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16):
        weight = inside.normalized_weight()
        advance_spectral_norm(inside)
    assert torch.equal(weight, layer.normalized_weight().bfloat16())
    advance_spectral_norm(layer)
    assert torch.equal(inside.u, layer.u) and torch.equal(inside.v, layer.v)


def test_initialize_xavier_is_uniform_within_its_bound_and_biases_are_zero() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(SNConv2d(16, 32, 3), SNLinear(40, 60), SNEmbedding(50, 30))
    initialize(network, "xavier", 1e-6)
    for layer, fans in zip(network, (9 * (16 + 32), 40 + 60, 50 + 30), strict=True):
        assert isinstance(layer, SpectralNorm)
        bound = math.sqrt(6 / fans)
        assert layer.weight.abs().max().item() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)  # a uniform distribution's
        assert layer.eps == 1e-6
        assert not isinstance(layer, SNConv2d | SNLinear) or (layer.bias is not None and not layer.bias.any())


def test_initialize_orthogonal() -> None:
    network = nn.Sequential(SNLinear(8, 12), SNConv2d(4, 6, 3))
    initialize(network, "orthogonal", 1e-8)
    torch.testing.assert_close(network[0].weight.T @ network[0].weight, torch.eye(8))
    rows = network[1].weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(6))


def test_initialize_refuses_another_name() -> None:
    with pytest.raises(ValueError, match="init must be 'xavier' or 'orthogonal', got 'kaiming'"):
        initialize(SNLinear(2, 2), "kaiming", 1e-8)


def explicit_attention(layer: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Equations of the official non_local.py, pixel by pixel; returns output and map."""

    def pointwise(conv: SNConv2d, maps: Tensor) -> Tensor:
        matrix = conv.weight[:, :, 0, 0]
        return torch.einsum("oc,nchw->nohw", matrix / (conv.u @ matrix @ conv.v), maps)

    def pool(maps: Tensor) -> Tensor:
        n, c, h, w = maps.shape
        return maps.view(n, c, h // 2, 2, w // 2, 2).amax((3, 5)).reshape(n, c, -1)

    theta = pointwise(layer.query, x).reshape(*x.shape[:1], -1, x.shape[2] * x.shape[3])
    phi, g = pool(pointwise(layer.key, x)), pool(pointwise(layer.value, x))
    scores = torch.einsum("ncq,nck->nqk", theta, phi)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    taken = torch.einsum("nqk,nck->ncq", weights, g).reshape(len(x), -1, *x.shape[2:])
    return x + layer.gain * pointwise(layer.output, taken), weights


def test_attention_equals_the_explicit_formula() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(16).double()
    layer.gain.data.fill_(0.7)
    x = torch.randn(3, 16, 6, 4, dtype=torch.float64)
    expected, weights = explicit_attention(layer, x)
    assert weights.shape == (3, 24, 6)
    torch.testing.assert_close(layer.attention_map(x), weights, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    sizes = [tuple(conv.weight.shape[:2]) for conv in (layer.query, layer.key, layer.value, layer.output)]
    assert sizes == [(2, 16), (2, 16), (8, 16), (16, 8)]
    assert all(conv.bias is None for conv in (layer.query, layer.key, layer.value, layer.output))


def test_attention_starts_as_the_identity_and_its_gain_learns() -> None:
    layer = SelfAttention(8)
    x = torch.randn(2, 8, 4, 4)
    y = layer(x)
    assert torch.equal(y, x)
    (y * torch.randn_like(y)).sum().backward()
    assert layer.gain.shape == () and layer.gain.grad is not None and layer.gain.grad != 0


def test_attention_softmax_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(16)
    x = 20 * torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        weights = layer.attention_map(x)
        query, key = layer.query(x), F.max_pool2d(layer.key(x), 2)
        output = layer(x)
    assert query.dtype == torch.bfloat16 and weights.dtype == torch.float32 and output.dtype == torch.float32
    expected = torch.softmax(query.float().flatten(2).transpose(1, 2) @ key.float().flatten(2), -1)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)


def test_attention_needs_channels_in_eights() -> None:
    with pytest.raises(ValueError, match=r"multiple of 8, got 12.*attention_resolution"):
        SelfAttention(12)


def test_attention_gains_are_named_and_detached() -> None:
    network = nn.ModuleDict({"a": SelfAttention(8), "b": SNLinear(2, 2), "c": SelfAttention(8)})
    network["c"].gain.data.fill_(2)
    gains = attention_gains(network)
    assert {name: gain.item() for name, gain in gains.items()} == {"a": 0, "c": 2}
    assert not any(gain.requires_grad for gain in gains.values())


def test_conditional_batch_norm_equals_batch_norm_with_each_class_affine() -> None:
    torch.manual_seed(0)
    layer = ConditionalBatchNorm2d(4, num_classes=3, eps=1e-3, momentum=0.2).double()
    nn.init.normal_(layer.gain.weight)
    nn.init.normal_(layer.bias.weight)
    x = 2 * torch.randn(6, 4, 3, 3, dtype=torch.float64) + 5
    labels = torch.tensor([0, 2, 2, 1, 0, 2])
    mean, variance = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    y = layer(x, labels)
    F.batch_norm(x, mean, variance, training=True, momentum=0.2)
    torch.testing.assert_close(layer.norm.running_mean, mean)
    torch.testing.assert_close(layer.norm.running_var, variance)
    in_eval = layer.eval()(x, labels)
    for c in range(3):
        gain, bias = layer.gain.weight[c], layer.bias.weight[c]
        expected = F.batch_norm(x, None, None, gain, bias, training=True, eps=1e-3)[labels == c]
        torch.testing.assert_close(y[labels == c], expected)
        expected = F.batch_norm(x, mean, variance, gain, bias, training=False, eps=1e-3)[labels == c]
        torch.testing.assert_close(in_eval[labels == c], expected)


def test_class_tables_start_at_one_and_zero_without_spectral_norm() -> None:
    layer = ConditionalBatchNorm2d(4, num_classes=3)
    assert torch.equal(layer.gain.weight, torch.ones(3, 4)) and torch.equal(layer.bias.weight, torch.zeros(3, 4))
    assert not any(isinstance(module, SpectralNorm) for module in layer.modules())


def test_ablation_bounds_what_classes_share() -> None:
    # The reason against it: a shift common to K classes cannot exceed 1 / sqrt(K), however long it is trained.
    layer = ConditionalBatchNorm2d(4, num_classes=100, spectral_norm_tables=True)
    nn.init.constant_(layer.bias.weight, 7)
    for _ in range(20):
        advance_spectral_norm(layer)
    x = torch.randn(8, 4, 3, 3)
    zero_input = layer(x, torch.arange(8)).mean((0, 2, 3))
    assert zero_input.norm().item() <= 1 / math.sqrt(100) * 1.2
    assert isinstance(layer.gain, SNEmbedding) and isinstance(layer.bias, SNEmbedding)


def test_unconditional_batch_norm_equals_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = ConditionalBatchNorm2d(4, num_classes=0, momentum=0.3), nn.BatchNorm2d(4, momentum=0.3)
    x = torch.randn(6, 4, 3, 3)
    for _ in range(2):
        assert torch.equal(ours(x, None), theirs(x))
    assert {key.removeprefix("norm."): value.tolist() for key, value in ours.state_dict().items()} == {
        key: value.tolist() for key, value in theirs.state_dict().items()
    }
    assert torch.equal(ours.eval()(x, None), theirs.eval()(x))


def test_batch_statistics_are_float32_of_a_bfloat16_map() -> None:
    # 256 + noise of 0.5: bfloat16 sums would be off by far more than the tolerance.
    torch.manual_seed(0)
    layer = ConditionalBatchNorm2d(3, num_classes=2, momentum=1.0)
    x = (torch.randn(4, 3, 32, 32) / 2 + 256).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, torch.tensor([0, 1, 1, 0]))
    assert y.dtype == torch.bfloat16 and layer.norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(layer.norm.running_mean, x.double().mean((0, 2, 3)).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.norm.running_var, x.double().var((0, 2, 3)).float(), rtol=1e-3, atol=0)


def test_batch_norm_refuses_other_than_four_dimensions() -> None:
    with pytest.raises(ValueError, match=r"expects \(N, C, H, W\), got shape \(2, 3\)"):
        CrossReplicaBatchNorm2d(3)(torch.zeros(2, 3))


def test_attention_place_is_the_first_map_of_that_size() -> None:
    assert attention_place(8, [16, 8, 8, 8]) == 1
    assert attention_place(None, [16, 8]) is None
    with pytest.raises(ValueError, match="must be None or one of 8, 16 here, got 64"):
        attention_place(64, [16, 8, 8])


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        (None, 10, r"conditional \(num_classes=10\): labels must be given"),
        (torch.tensor([0, 1]), 0, "unconditional.*labels=None"),
        (torch.tensor([0, 10]), 10, r"must lie in 0..9, got 0..10"),
        (torch.tensor([-1, 3]), 10, r"must lie in 0..9, got -1..3"),
        (torch.tensor([0, 1, 2]), 10, r"int64 of shape \(2,\), got torch.int64 \(3,\)"),
        (torch.tensor([0.0, 1.0]), 10, r"int64 of shape \(2,\), got torch.float32"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor | None, num_classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labels(labels, num_classes, batch_size=2)


def test_spectral_norms_are_the_largest_singular_values_once_converged():
    torch.manual_seed(0)
    network = torch.nn.Sequential(SNConv2d(3, 5, 3), torch.nn.ReLU(), SNLinear(7, 4))
    for _ in range(200):
        advance_spectral_norm(network)
    for name, sigma in spectral_norms(network).items():
        weight = network.get_submodule(name).weight.detach()
        torch.testing.assert_close(sigma, torch.linalg.svdvals(weight.flatten(1))[0], rtol=1e-4, atol=0)
    assert list(spectral_norms(network)) == ["0", "2"]
