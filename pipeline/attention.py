"""Where a network looks: attention maps over images, as in the figures of the SAGAN paper (arXiv 1805.08318)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline import drawing

# Places to look from, (x, y) as shares of width and height, and the colour of each.
QUERIES = ((0.5, 0.5), (0.28, 0.3), (0.72, 0.3), (0.28, 0.72), (0.72, 0.72))
COLOURS = ((225, 60, 50), (45, 125, 235), (35, 165, 80), (240, 165, 20), (165, 85, 205))
_CELL = 96  # pixels

Place = tuple[float, float]


def has_attention(network: nn.Module) -> bool:
    """Whether a network has an attention layer."""
    return getattr(network, "attention", None) is not None


@torch.no_grad()
def attention_maps(network: nn.Module, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs a network and computes the map of its attention layer from what that layer saw.

    Training needs no code for this and has none.

    Args:
        network: a generator or discriminator with attention.
        inputs: of the network, for N images.

    Returns:
        What the network returned, and maps (N, H, W, H/2, W/2): of the pixel [h, w] of the layer's map, how much it
        takes from each 2x2 cell; the sum over the cells is 1.
    """
    seen: list[Tensor] = []
    layer = network.attention
    assert isinstance(layer, nn.Module)
    handle = layer.register_forward_pre_hook(lambda layer, arguments: seen.append(arguments[0]))
    try:
        output: Tensor = network(*inputs)
    finally:
        handle.remove()
    n, _, height, width = seen[0].shape
    maps: Tensor = layer.attention_map(seen[0])  # type: ignore[operator]  # a method, which nn.Module hides
    return output, maps.view(n, height, width, height // 2, width // 2)


def map_of(maps: Tensor, place: Place) -> npt.NDArray[np.float32]:
    """Returns the map (H/2, W/2) of one image, `maps` (H, W, H/2, W/2), as seen from a place in it."""
    height, width = maps.shape[:2]
    row, column = min(int(place[1] * height), height - 1), min(int(place[0] * width), width - 1)
    found: npt.NDArray[np.float32] = maps[row, column].float().cpu().numpy()
    return found


def draw_figure(
    generator: nn.Module,
    discriminator: nn.Module | None,
    z: Tensor,
    labels: Tensor | None,
    titles: Sequence[str],
    places: Sequence[Place] = QUERIES,
) -> Image.Image | None:
    """Draws what generator and discriminator look at: a row per image and network, a column per place.

    The first cell of a row has the places as coloured points. The others show, in the colour of the place that is
    looked from, where the network looks: full colour is the largest weight of that map.

    Args:
        generator: in eval mode.
        discriminator: None leaves its rows out.
        z: (N, z_dim) noise on the CPU.
        labels: (N,) classes on the CPU; None if the networks are unconditional.
        titles: of the N images.
        places: to look from, at most as many as there are colours.

    Returns:
        None if neither network has attention.
    """
    assert len(places) <= len(COLOURS)
    weight = next(generator.parameters())
    z, labels = z.to(weight), None if labels is None else labels.to(weight.device)
    found: list[tuple[str, Tensor]] = []
    if has_attention(generator):
        images, maps = attention_maps(generator, z, labels)
        found.append(("G", maps))
    else:
        with torch.no_grad():
            images = generator(z, labels)
    if discriminator is not None and has_attention(discriminator):
        found.append(("D", attention_maps(discriminator, images, labels)[1]))
    if not found:
        return None
    rows, row_titles = [], []
    for index, picture in enumerate(drawing.cells(images, _CELL)):
        for network, maps in found:
            rows.append(_row(picture, maps[index], places))
            row_titles.append(f"{titles[index]}, {network}" if titles[index] else network)
    return drawing.tile(rows, row_titles)


def _row(picture: Image.Image, maps: Tensor, places: Sequence[Place]) -> list[Image.Image]:
    marked = picture.copy()
    row = [marked]
    for place, colour in zip(places, COLOURS, strict=False):
        drawing.dot(marked, place, colour)
        cell = drawing.heat(picture, map_of(maps, place), colour)
        drawing.dot(cell, place, colour)
        drawing.frame(cell, colour)
        row.append(cell)
    return row
