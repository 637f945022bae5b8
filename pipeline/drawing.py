"""Pictures of pictures: cells in rows and columns with titles, marks on images, all drawn by Pillow."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.sampling import to_uint8

Colour = tuple[int, int, int]

_SMALLEST_CELL = 64  # pixels; smaller images are enlarged by repeating pixels
_GAP, _MARGIN = 2, 8
_LONGEST_TITLE = 28  # characters
_INK, _PAPER = (40, 40, 40), (255, 255, 255)


def cells(images: Tensor, smallest: int = _SMALLEST_CELL) -> list[Image.Image]:
    """Returns images (N, 3, R, R) in [-1, 1] or uint8 as pictures at least `smallest` pixels wide."""
    pixels = images if not images.is_floating_point() else to_uint8(images)
    scale = math.ceil(smallest / pixels.shape[-1])
    arrays = pixels.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def tile(
    rows: Sequence[Sequence[Image.Image]], row_titles: Sequence[str] = (), column_titles: Sequence[str] = ()
) -> Image.Image:
    """Returns cells of one size in rows and columns on white.

    Args:
        rows: of cells; a row may be shorter than others.
        row_titles: to the left of each row; may be empty.
        column_titles: above each column; may be empty.
    """
    width, height = rows[0][0].size
    size = max(11, min(width, height) // 7)
    font = ImageFont.load_default(size)
    titles = [shorten(title) for title in row_titles]
    left = math.ceil(max((font.getlength(title) for title in titles), default=0)) + (_MARGIN if titles else 0)
    above = round(size * 1.6) if column_titles else 0
    columns = max(len(row) for row in rows)
    sheet = Image.new(
        "RGB",
        (left + columns * (width + _GAP) + _GAP, above + len(rows) * (height + _GAP) + _GAP),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        middle = left + _GAP + column * (width + _GAP) + width / 2
        draw.text((middle, above / 2), shorten(title), _INK, font, anchor="mm")
    for index, row in enumerate(rows):
        top = above + _GAP + index * (height + _GAP)
        if titles:
            draw.text((left - _MARGIN / 2, top + height / 2), titles[index], _INK, font, anchor="rm")
        for column, cell in enumerate(row):
            sheet.paste(cell, (left + _GAP + column * (width + _GAP), top))
    return sheet


def shorten(text: str) -> str:
    """Returns a title that fits: its beginning, if it is long."""
    return text if len(text) <= _LONGEST_TITLE else text[: _LONGEST_TITLE - 3].rstrip() + "..."


def dot(picture: Image.Image, place: tuple[float, float], colour: Colour) -> None:
    """Draws a point with a white rim; `place` is (x, y) as shares of the width and height."""
    x, y = place[0] * picture.width, place[1] * picture.height
    radius = max(3.0, picture.width / 24)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((x - radius - 1.5, y - radius - 1.5, x + radius + 1.5, y + radius + 1.5), _PAPER)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def heat(picture: Image.Image, values: npt.NDArray[np.float32], colour: Colour) -> Image.Image:
    """Returns the picture in dim grey with `values` (h, w), not negative, over it: the largest in full colour."""
    grey = np.asarray(picture.convert("L"), np.float32)[:, :, None] * 0.45
    share = Image.fromarray(values / max(float(values.max()), 1e-12)).resize(picture.size, Image.Resampling.BILINEAR)
    alpha = np.asarray(share, np.float32)[:, :, None] * 0.85
    return Image.fromarray((grey * (1 - alpha) + np.array(colour, np.float32) * alpha).round().astype(np.uint8))


def frame(picture: Image.Image, colour: Colour) -> None:
    """Draws a frame along the edge of a picture."""
    width = max(2, picture.width // 48)
    ImageDraw.Draw(picture).rectangle((0, 0, picture.width - 1, picture.height - 1), outline=colour, width=width)


def caption(picture: Image.Image, text: str) -> Image.Image:
    """Returns the picture with a line of text below it."""
    font = ImageFont.load_default(16)
    sheet = Image.new("RGB", (picture.width, picture.height + 26), _PAPER)
    sheet.paste(picture, (0, 0))
    ImageDraw.Draw(sheet).text((picture.width / 2, picture.height + 13), text, _INK, font, anchor="mm")
    return sheet
