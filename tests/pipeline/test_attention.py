"""Attention maps against the softmax computed by hand from a network's weights, and the figure drawn of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import attention, drawing
from sagan import DcganDiscriminator, DcganGenerator, Discriminator, Generator


def by_hand(layer, x: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(theta(x)^T phi(x)) over the max-pooled cells, from weights divided by their spectral norm."""
    theta, phi = (
        conv.weight[:, :, 0, 0] / (conv.u @ conv.weight[:, :, 0, 0] @ conv.v) for conv in (layer.query, layer.key)
    )
    n, _, height, width = x.shape
    queries = torch.einsum("oc,nchw->nohw", theta, x)
    keys = torch.einsum("oc,nchw->nohw", phi, x).view(n, -1, height // 2, 2, width // 2, 2).amax((3, 5))
    products = torch.einsum("nohw,noij->nhwij", queries, keys) * scale
    return products.exp() / products.exp().sum((3, 4), keepdim=True)


@pytest.mark.parametrize(
    ("generator", "discriminator", "scale"),
    [
        (lambda: Generator(32, 8, 3, 12, 16), lambda: Discriminator(32, 8, 3, 16), 1.0),
        (lambda: DcganGenerator(16, 12), lambda: DcganDiscriminator(16), 2**-0.5),
    ],
)
def test_each_map_sums_to_1_over_keys_and_is_the_softmax_by_hand(generator, discriminator, scale):
    torch.manual_seed(0)
    networks = [generator().double().eval(), discriminator().double().eval()]
    labels = torch.tensor([0, 2]) if networks[0].num_classes else None
    size = networks[0].resolution
    z, images = (20 * torch.randn(2, *shape, dtype=torch.float64) for shape in ((12,), (3, size, size)))
    for network, inputs in zip(networks, (z, images), strict=True):
        seen = []
        handle = network.attention.register_forward_hook(
            lambda layer, arguments, output, seen=seen: seen.append(arguments[0])
        )
        expected_output = network(inputs, labels)
        handle.remove()
        output, maps = attention.attention_maps(network, inputs, labels)
        torch.testing.assert_close(output, expected_output)
        height = seen[0].shape[2]
        assert maps.shape == (2, height, height, height // 2, height // 2)
        torch.testing.assert_close(maps.sum((3, 4)), torch.ones(2, height, height, dtype=torch.float64))
        torch.testing.assert_close(maps, by_hand(network.attention, seen[0], scale))
        assert maps.max() > 1.1 * maps.mean() and not network.attention._forward_pre_hooks


def test_a_place_is_looked_from_in_its_own_pixel():
    maps = torch.arange(8 * 8)[:, None, None].expand(-1, 4, 4).reshape(8, 8, 4, 4).float()
    for place, pixel in [((0, 0), 0), ((0.99, 0), 7), ((1, 1), 63), ((0.5, 0.25), 2 * 8 + 4)]:
        assert (attention.map_of(maps, place) == pixel).all()


def test_the_figure_has_points_and_colours_where_the_network_looks(monkeypatch):
    torch.manual_seed(0)
    generator, discriminator = Generator(16, 8, 3, 12, 8).eval(), Discriminator(16, 8, 3, None).eval()
    looked_at = torch.zeros(2, 8, 8, 4, 4)
    looked_at[..., 0, 3] = 1  # everywhere at the upper right
    images = torch.full((2, 3, 16, 16), -1.0)  # black
    monkeypatch.setattr(attention, "attention_maps", lambda *inputs: (images, looked_at))
    labels = torch.tensor([0, 1])
    figure = attention.draw_figure(
        generator, discriminator, torch.zeros(2, 12), labels, ["a", "b"], [(0.5, 0.5), (0.1, 0.9)]
    )
    pixels = np.asarray(figure).astype(int)
    cell, rows = 96, 2
    left = pixels.shape[1] - 3 * (cell + 2)
    assert pixels.shape[0] == rows * (cell + 2) + 2, "D has no attention here, hence no rows"
    for row in range(rows):
        top = 2 + row * (cell + 2)
        first = pixels[top : top + cell, left : left + cell]
        assert tuple(first[48, 48]) == attention.COLOURS[0] and tuple(first[86, 9]) == attention.COLOURS[1]
        for column, colour in enumerate(attention.COLOURS[:2], start=1):
            shown = pixels[top : top + cell, left + column * (cell + 2) : left + column * (cell + 2) + cell]
            strength = shown[8:-8, 8:-8].sum(2)
            assert strength[:20, -20:].mean() > 5 * max(1, strength[:40, :40].mean())
            assert np.argmax(shown[10, -10]) == np.argmax(colour)


def test_networks_without_attention_have_no_figure():
    generator, discriminator = Generator(16, 8, 0, 12, None).eval(), Discriminator(16, 8, 0, None)
    assert attention.draw_figure(generator, discriminator, torch.zeros(1, 12), None, [""]) is None


def test_cells_keep_every_pixel_and_long_titles_are_cut():
    images = torch.tensor([-1.0, 1.0]).repeat(1, 3, 2, 1)  # 2x2: black and white columns
    (cell,) = drawing.cells(images, smallest=8)
    assert np.array_equal(np.asarray(cell)[0, :, 0], [0] * 4 + [255] * 4)
    assert drawing.shorten("a" * 40) == "a" * 25 + "..."
    sheet = drawing.tile([[cell, cell], [cell]], ["x", "y"])
    assert isinstance(sheet, Image.Image) and sheet.height == 2 * (8 + 2) + 2
