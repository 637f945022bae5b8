"""Generator and discriminator: sizes, shapes, ranges, gradients, precision, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sagan import Discriminator, Generator, advance_spectral_norm, hinge_d, hinge_g
from sagan.discriminator import DiscriminatorBlock, FirstDiscriminatorBlock
from sagan.generator import GeneratorBlock
from sagan.layers import ConditionalBatchNorm2d, SNConv2d, SNEmbedding, SNLinear, SpectralNorm

RESOLUTIONS = [16, 32, 64, 128, 256]


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def record_outputs(*networks: nn.Module) -> dict[str, Tensor]:
    """Fill the returned dict, in order of the forward pass, with the first output of every module."""
    seen: dict[str, Tensor] = {}
    for name, module in nn.ModuleList(networks).named_modules():

        def record(module: nn.Module, inputs: object, output: Tensor, name: str = name) -> None:
            seen.setdefault(name, output)

        module.register_forward_hook(record)
    return seen


@pytest.fixture
def no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build full-width networks without drawing weights: sizes need no values."""
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, *bounds, **options: tensor)
    monkeypatch.setattr(SpectralNorm, "power_iteration", lambda layer: None)


@pytest.mark.parametrize(
    ("resolution", "num_classes", "attention_resolution", "generator_count", "discriminator_count"),
    [
        (128, 1000, 32, 42_078_852, 39_463_618),  # official structure
        (128, 1000, 64, 42_017_412, 39_448_258),  # BigGAN-PyTorch's SAGAN script, StudioGAN
        (128, 1000, None, 41_996_931, 39_443_137),
        (64, 200, 32, 13_387_396, 19_752_642),  # StudioGAN Tiny_ImageNet: after G's block 3 and D's block 1, both 32x32
        (32, 10, 16, 4_386_308, 1_075_586),  # StudioGAN CIFAR10, mimicry sagan_32
    ],
)
def test_parameter_counts_of_published_networks(
    resolution: int,
    num_classes: int,
    attention_resolution: int | None,
    generator_count: int,
    discriminator_count: int,
    no_values: None,
) -> None:
    generator = Generator(resolution, 64, num_classes, 128, attention_resolution)
    discriminator = Discriminator(resolution, 64, num_classes, attention_resolution)
    assert (count(generator), count(discriminator)) == (generator_count, discriminator_count)


def test_parameter_counts_at_16_pixels_by_hand() -> None:
    # Two up-blocks of width 4 * 8 = 32; three D blocks of width 2 * 8 = 16, the first halves; attention at 8x8.
    up_block = 2 * (2 * 5 * 32) + 2 * (9 * 32 * 32 + 32) + (32 * 32 + 32)
    attention_32 = 2 * 32 * 4 + 2 * 32 * 16 + 1
    generator = (20 * 32 * 16 + 32 * 16) + 2 * up_block + attention_32 + 2 * 32 + (9 * 32 * 3 + 3)
    assert count(Generator(16, 8, num_classes=5, z_dim=20, attention_resolution=8)) == generator

    first_block = (9 * 3 * 16 + 16) + (9 * 16 * 16 + 16) + (3 * 16 + 16)
    flat_block = 2 * (9 * 16 * 16 + 16)  # identity shortcut
    attention_16 = 2 * 16 * 2 + 2 * 16 * 8 + 1
    discriminator = first_block + 2 * flat_block + attention_16 + (16 + 1) + 5 * 16
    assert count(Discriminator(16, 8, num_classes=5, attention_resolution=8)) == discriminator


def test_parameter_counts_at_256_pixels_are_those_at_128_and_one_more_block(no_values: None) -> None:
    # BigGAN and StudioGAN insert a block of width 8 * 64 = 512 that keeps its width; so at 64x64 pixels, where
    # attention stands here, maps become twice as wide: 128 to 256 in G, 64 to 128 in D.
    tables, convs, shortcut = 2 * (2 * 10 * 512), 2 * (9 * 512 * 512 + 512), 512 * 512 + 512
    generators = [count(Generator(resolution, 64, 10, 128, 64)) for resolution in (128, 256)]
    attention = {c: 2 * c * (c // 8) + 2 * c * (c // 2) + 1 for c in (64, 128, 256)}
    assert generators[1] - generators[0] == tables + convs + shortcut + attention[256] - attention[128]
    discriminators = [count(Discriminator(resolution, 64, 10, 64)) for resolution in (128, 256)]
    assert discriminators[1] - discriminators[0] == convs + shortcut + attention[128] - attention[64]


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_shapes_ranges_and_a_gradient_for_every_parameter(resolution: int, num_classes: int) -> None:
    # A parameter without gradient would stop DistributedDataParallel.
    torch.manual_seed(0)
    attention_resolution = min(resolution // 2, 32)
    generator = Generator(resolution, 8, num_classes, 20, attention_resolution)
    discriminator = Discriminator(resolution, 8, num_classes, attention_resolution)
    labels = torch.tensor([0, num_classes - 1]) if num_classes else None
    images = generator(torch.randn(2, 20), labels)
    assert images.shape == (2, 3, resolution, resolution) and images.dtype == torch.float32
    assert images.abs().max() <= 1 and images.std() > 0
    logits = discriminator(images, labels)
    assert logits.shape == (2,) and logits.dtype == torch.float32
    hinge_g(logits).backward()
    for name, parameter in [*generator.named_parameters(), *discriminator.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert (generator.resolution, generator.num_classes, generator.z_dim) == (resolution, num_classes, 20)


def test_attention_stands_after_the_first_map_of_its_size() -> None:
    generator, discriminator = Generator(32, 8, 2, 4, 16), Discriminator(32, 8, 2, 8)
    seen = record_outputs(generator, discriminator)
    discriminator(generator(torch.randn(1, 4), torch.tensor([0])), torch.tensor([0]))
    order = [
        (name, seen[name].shape[-1])
        for name in seen
        if name[1:].startswith(".") and name.split(".")[-1] in ("attention", *"0123")
    ]
    # D's maps are 16, 8, 8, 8: attention comes between its second and third block, and only there.
    generator_order = [("0.blocks.0", 8), ("0.blocks.1", 16), ("0.attention", 16), ("0.blocks.2", 32)]
    discriminator_blocks = [(f"1.blocks.{i}", size) for i, size in enumerate((16, 8, 8, 8))]
    assert order == [*generator_order, *discriminator_blocks[:2], ("1.attention", 8), *discriminator_blocks[2:]]


def conv(layer: SNConv2d, x: Tensor) -> Tensor:
    matrix = layer.weight.flatten(1)
    weight = layer.weight / (layer.u @ matrix @ layer.v)
    return F.conv2d(x, weight, layer.bias, padding=layer.kernel_size[0] // 2)


def random_biases(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, SNConv2d) and layer.bias is not None:
            nn.init.normal_(layer.bias)


def test_generator_block_is_the_official_block() -> None:
    torch.manual_seed(0)
    block = GeneratorBlock(4, 6, lambda width: ConditionalBatchNorm2d(width, 0)).double()
    random_biases(block)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)

    def up(maps: Tensor) -> Tensor:
        return maps.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def norm(maps: Tensor) -> Tensor:
        return F.batch_norm(maps, None, None, training=True)

    h = conv(block.conv1, up(F.relu(norm(x))))
    h = conv(block.conv2, F.relu(norm(h)))
    torch.testing.assert_close(block(x, None), h + conv(block.shortcut, up(x)))


def test_discriminator_blocks_are_the_official_blocks() -> None:
    torch.manual_seed(0)
    first, down, wider, flat = (
        FirstDiscriminatorBlock(4).double(),
        DiscriminatorBlock(4, 4, downsample=True).double(),
        DiscriminatorBlock(4, 6, downsample=False).double(),
        DiscriminatorBlock(6, 6, downsample=False).double(),
    )
    for block in (first, down, wider, flat):
        random_biases(block)

    def pool(maps: Tensor) -> Tensor:
        n, c, h, w = maps.shape
        return maps.view(n, c, h // 2, 2, w // 2, 2).mean((3, 5))

    def residual(block: DiscriminatorBlock, x: Tensor) -> Tensor:
        return conv(block.conv2, F.relu(conv(block.conv1, F.relu(x))))

    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    x = first(images)
    h = conv(first.conv2, F.relu(conv(first.conv1, images)))
    torch.testing.assert_close(x, pool(h) + conv(first.shortcut, pool(images)))
    assert down.shortcut is not None and wider.shortcut is not None and flat.shortcut is None
    torch.testing.assert_close(down(x), pool(residual(down, x)) + pool(conv(down.shortcut, x)))
    torch.testing.assert_close(wider(x), residual(wider, x) + conv(wider.shortcut, x))
    x = wider(x)
    torch.testing.assert_close(flat(x), residual(flat, x) + x)


def test_projection_by_hand() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(16, 4, num_classes=3, attention_resolution=8).double()
    nn.init.constant_(discriminator.linear.bias, 0.25)
    maps: list[Tensor] = []
    discriminator.blocks[-1].register_forward_hook(lambda m, i, o: maps.append(o))
    labels = torch.tensor([2, 0])
    logits = discriminator(torch.randn(2, 3, 16, 16, dtype=torch.float64), labels)

    def divided(layer: SNLinear | SNEmbedding) -> list[list[float]]:
        table: list[list[float]] = (layer.weight / (layer.u @ layer.weight @ layer.v)).tolist()
        return table

    [weight], embedding = divided(discriminator.linear), divided(discriminator.embedding)
    for i, label in enumerate(labels.tolist()):
        h = [sum(max(p, 0) for row in channel for p in row) for channel in maps[0][i].tolist()]
        expected = 0.25 + sum((w + e) * x for w, e, x in zip(weight, embedding[label], h, strict=True))
        assert logits[i].item() == pytest.approx(expected, rel=1e-10)


def uncached_reference(network: nn.Module) -> nn.Module:
    """A copy whose layers are torch's own under torch's spectral norm, with u and v frozen (eval) as they are now."""
    reference = copy.deepcopy(network)
    for module in list(reference.modules()):
        for name, layer in list(module.named_children()):
            plain: nn.Module
            if isinstance(layer, SNConv2d):
                size = layer.kernel_size[0]
                bias = layer.bias is not None
                plain = nn.Conv2d(layer.in_channels, layer.out_channels, size, padding=size // 2, bias=bias)
            elif isinstance(layer, SNLinear):
                plain = nn.Linear(layer.in_features, layer.out_features)
            elif isinstance(layer, SNEmbedding):
                plain = nn.Embedding(layer.num_embeddings, layer.embedding_dim)
            else:
                continue
            plain.to(layer.weight.dtype)
            plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
            parametrizations.spectral_norm(plain, eps=layer.eps)
            plain.parametrizations.weight[0]._u.copy_(layer.u)
            plain.parametrizations.weight[0]._v.copy_(layer.v)
            setattr(module, name, plain.eval())
    return reference


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace("parametrizations.weight.original", "weight"): parameter.grad
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }


def assert_gradients_equal(network: nn.Module, reference: nn.Module) -> None:
    ours, theirs = gradients(network), gradients(reference)
    assert ours.keys() == theirs.keys() and len(ours) == len(list(network.parameters()))
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_gradients_of_a_step_of_micro_batches_equal_an_uncached_model() -> None:
    # A D step of three micro-batches, its Adam update, then a G step of three through the new D, u and v frozen.
    torch.manual_seed(0)
    generator = Generator(16, 8, num_classes=3, z_dim=5, attention_resolution=8).double()
    discriminator = Discriminator(16, 8, num_classes=3, attention_resolution=8).double()
    for network in (generator, discriminator):
        network.attention.gain.data.fill_(0.5)
        advance_spectral_norm(network)
    z = torch.randn(3, 4, 5, dtype=torch.float64)
    labels = torch.randint(3, (3, 4))
    images = torch.rand(3, 4, 3, 16, 16, dtype=torch.float64) * 2 - 1

    def discriminator_gradients(g: nn.Module, d: nn.Module) -> None:
        for m in range(3):
            with torch.no_grad():
                fakes = g(z[m], labels[m])
            real, fake = d(torch.cat([images[m], fakes]), labels[m].repeat(2)).chunk(2)
            (hinge_d(real, fake) / 3).backward()

    def generator_gradients(g: nn.Module, d: nn.Module) -> None:
        d.requires_grad_(False)
        for m in range(3):
            (hinge_g(d(g(z[m], labels[m]), labels[m])) / 3).backward()

    g_reference, d_reference = uncached_reference(generator), uncached_reference(discriminator)
    discriminator_gradients(generator, discriminator)
    discriminator_gradients(g_reference, d_reference)
    assert_gradients_equal(discriminator, d_reference)

    torch.optim.Adam(discriminator.parameters(), lr=1e-2).step()
    g_reference, d_reference = uncached_reference(generator), uncached_reference(discriminator)
    generator_gradients(generator, discriminator)
    generator_gradients(g_reference, d_reference)
    assert_gradients_equal(generator, g_reference)


def test_singular_vectors_move_only_when_told() -> None:
    torch.manual_seed(0)
    generator = Generator(16, 8, num_classes=2, z_dim=4, attention_resolution=8)
    discriminator = Discriminator(16, 8, num_classes=2, attention_resolution=8)
    labels = torch.tensor([0, 1])

    def vectors() -> dict[str, Tensor]:
        buffers = [*generator.named_buffers(prefix="g"), *discriminator.named_buffers(prefix="d")]
        return {name: buffer.clone() for name, buffer in buffers if name.endswith((".u", ".v"))}

    before = vectors()
    num_layers = sum(isinstance(m, SpectralNorm) for n in (generator, discriminator) for m in n.modules())
    assert len(before) == 2 * num_layers > 0
    for training in (True, False):
        generator.train(training)
        discriminator.train(training)
        for _ in range(2):
            discriminator(generator(torch.randn(2, 4), labels), labels).sum().backward()
    after = vectors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    advance_spectral_norm(discriminator.eval())  # the mode does not matter
    moved = {name for name, value in vectors().items() if not torch.equal(value, before[name])}
    # The final linear layer has one row, hence one direction, found at the start.
    assert moved == {name for name in before if name.startswith("d.") and not name.startswith("d.linear.")}


def test_equal_seeds_give_equal_networks_and_buffers() -> None:
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        g, d = Generator(16, 8, 2, 4, 8), Discriminator(16, 8, 2, 8)
        states.append([*g.state_dict().values(), *d.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))


def test_networks_in_float64_stay_float64_everywhere() -> None:
    generator = Generator(16, 8, 2, 4, 8).double()
    discriminator = Discriminator(16, 8, 2, 8).double()
    seen = record_outputs(generator, discriminator)
    labels = torch.tensor([0, 1])
    discriminator(generator(torch.randn(2, 4, dtype=torch.float64), labels), labels)
    assert {output.dtype for output in seen.values()} == {torch.float64}


def test_bfloat16_autocast_keeps_images_logits_and_losses_float32() -> None:
    torch.manual_seed(0)
    generator = Generator(32, 8, 2, 4, 16)
    discriminator = Discriminator(32, 8, 2, 16)
    seen = record_outputs(generator, discriminator)
    labels, z = torch.tensor([0, 1]), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        images = generator(z, labels)
        loss = hinge_g(discriminator(images, labels))
    loss.backward()
    # Maps are bfloat16 (the saving), the head of D is float32.
    low = ("0.blocks.0", "0.attention", "0.final_norm", "0.final_conv", "1.blocks.1", "1.attention")
    high = ("0", "1.linear", "1.embedding", "1")
    assert {seen[name].dtype for name in low} == {torch.bfloat16}
    assert {loss.dtype, *(seen[name].dtype for name in high)} == {torch.float32}
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
    torch.testing.assert_close(images, generator(z, labels), rtol=0, atol=0.05)


def test_images_do_not_depend_on_the_batch_in_eval_mode() -> None:
    torch.manual_seed(0)
    generator = Generator(16, 8, 3, 4, 8).double()
    z, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    generator(z, labels)
    generator.eval()
    torch.testing.assert_close(generator(z, labels)[2:4], generator(z[2:4], labels[2:4]))


def test_class_tables_change_the_image_and_ablation_warns() -> None:
    with pytest.warns(UserWarning, match="spectral_norm_on_class_tables=True.*34.8"):
        ablated = Generator(16, 8, 3, 4, 8, spectral_norm_on_class_tables=True)
    tables = [m for m in ablated.modules() if isinstance(m, ConditionalBatchNorm2d)]
    assert tables and all(isinstance(m.gain, SNEmbedding) and isinstance(m.bias, SNEmbedding) for m in tables)
    plain = Generator(16, 8, 3, 4, 8)
    assert count(ablated) == count(plain)
    assert not any(isinstance(m, SNEmbedding) for m in plain.modules())
    images = ablated(torch.randn(2, 4), torch.tensor([0, 1]))
    assert images.isfinite().all()


def test_unconditional_networks_have_no_class_parameters() -> None:
    generator, discriminator = Generator(16, 8, 0, 4, 8), Discriminator(16, 8, 0, 8)
    assert not any(isinstance(m, nn.Embedding) for n in (generator, discriminator) for m in n.modules())
    with pytest.raises(ValueError, match="unconditional"):
        generator(torch.randn(2, 4), torch.tensor([0, 0]))


def test_batch_norm_options_reach_every_layer() -> None:
    generator = Generator(16, 8, 2, 4, 8, batch_norm_eps=1e-4, batch_norm_momentum=0.01, sync_batch_norm=False)
    norms = [m for m in generator.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 5 and {(m.eps, m.momentum, m.sync) for m in norms} == {(1e-4, 0.01, False)}
    spectral = [m for m in Discriminator(16, 8, 2, 8, spectral_norm_eps=1e-6).modules() if isinstance(m, SpectralNorm)]
    assert {m.eps for m in spectral} == {1e-6}


@pytest.mark.parametrize("network", [Generator, Discriminator])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 96}, "resolution must be one of 16, 32, 64, 128, 256, got 96"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"attention_resolution": 64}, r"attention_resolution must be None or one of 8.* here, got 64"),
        ({"channels": 2, "attention_resolution": 8, "resolution": 64}, None),
        ({"init": "normal"}, "init must be 'xavier' or 'orthogonal', got 'normal'"),
    ],
)
def test_impossible_arguments_are_refused(network: type, arguments: dict[str, object], message: str | None) -> None:
    arguments = {"resolution": 16, "channels": 8, "num_classes": 2, "attention_resolution": 8} | arguments
    if message is None:  # 64 pixels, attention at 8x8: D has 8 * 2 channels there, G 8 * 2: a multiple of 8
        network(**arguments)
        return
    with pytest.raises(ValueError, match=message):
        network(**arguments)


def test_inputs_that_do_not_fit_are_refused() -> None:
    generator, discriminator = Generator(16, 8, 2, 4, 8), Discriminator(16, 8, 2, 8)
    with pytest.raises(ValueError, match=r"z must have shape \(N, 4\), got \(2, 5\)"):
        generator(torch.randn(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"images must have shape \(N, 3, 16, 16\), got \(2, 3, 32, 32\)"):
        discriminator(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="conditional"):
        discriminator(torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"0..1, got 0..2: does num_classes fit"):
        generator(torch.randn(2, 4), torch.tensor([0, 2]))
