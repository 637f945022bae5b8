import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from pipeline import images


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some grain: compresses like a photograph."""
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    smooth = np.stack([np.sin(x + y), np.cos(2 * x), np.sin(3 * y)], -1) * 90 + 120
    grain = np.random.default_rng(0).normal(0, 5, smooth.shape)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).convert(mode)


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def reference(data: bytes, size: int) -> np.ndarray:
    """Crop, convert, resize, each as a whole image with Pillow."""
    image = Image.open(io.BytesIO(data))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("extent", [(97, 64), (40, 71), (17, 17)])
def test_jpeg_is_cropped_and_resized_as_pillow_does_it(mode, extent):
    data = stored(picture(*extent, mode), "JPEG")
    pixels = images.to_square(images.decode(data), 32)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, reference(data, 32))


@pytest.mark.parametrize("mode", ["P", "1", "RGBA", "LA"])
def test_other_modes_become_rgb_as_pillow_converts_them(mode):
    data = stored(picture(50, 40, mode), "PNG")
    np.testing.assert_array_equal(images.to_square(images.decode(data), 24), reference(data, 24))


def test_palette_with_transparent_entries_converts_without_a_warning():
    data = stored(picture(32, 32, "P"), "PNG", transparency=bytes(range(256)))
    opaque = stored(picture(32, 32, "P"), "PNG")
    np.testing.assert_array_equal(images.to_square(images.decode(data), 32), reference(opaque, 32))


def test_of_16_bits_the_upper_8_stay():
    grey = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    pixels = images.to_square(images.decode(stored(Image.fromarray(grey), "PNG")), 64)
    np.testing.assert_array_equal(pixels, np.repeat((grey // 256)[:, :, None], 3, axis=2))


def test_an_image_of_the_right_side_is_not_resampled():
    image = picture(48, 32)
    np.testing.assert_array_equal(images.to_square(image, 32), np.asarray(image)[:, 8:40])


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image = picture(32, 32)
    turned, plain = stored(image, "JPEG", exif=exif), stored(image, "JPEG")
    np.testing.assert_array_equal(
        images.to_square(images.decode(turned), 32), images.to_square(images.decode(plain), 32)
    )


def test_unreadable_bytes_say_why():
    photo = stored(picture(64, 64), "JPEG")
    with pytest.raises(images.UnreadableImage, match="no image"):
        images.decode(b"this is a text file")
    with pytest.raises(images.UnreadableImage, match=r"(?i)truncated"):
        images.decode(photo[: len(photo) // 2])
    with pytest.raises(images.UnreadableImage, match="32-bit pixels"):
        images.to_square(images.decode(stored(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")), 8)


@pytest.mark.parametrize("encoding", ["webp", "png", "raw"])
def test_lossless_encodings_give_the_pixels_back(encoding):
    pixels = np.random.default_rng(1).integers(0, 256, (20, 20, 3), np.uint8)
    data = images.encode(pixels, encoding)
    if encoding == "raw":
        back = np.frombuffer(data, np.uint8).reshape(20, 20, 3)
    else:
        back = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(back, pixels)


def test_jpeg444_keeps_full_colour_resolution_and_is_close():
    pixels = np.asarray(picture(64, 64))
    image = Image.open(io.BytesIO(images.encode(pixels, "jpeg444")))
    assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4
    error = np.mean((np.asarray(image).astype(float) - pixels) ** 2)
    assert 10 * np.log10(255**2 / error) > 36


def test_histogram_counts_each_channel():
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0] = 7, 0, 255
    counted = images.histogram(pixels)
    assert counted.sum(1).tolist() == [4, 4, 4]
    assert (counted[0, 7], counted[0, 0], counted[1, 0], counted[2, 255]) == (1, 3, 4, 1)


def test_a_header_tells_format_size_and_mode_and_no_more():
    whole = stored(picture(240, 180), "JPEG")
    header = images.open_header(whole[: len(whole) // 2])  # its pixels are cut off
    assert (header.format, header.size, header.mode) == ("JPEG", (240, 180), "RGB")
    for data, reason in (
        (b"no image", "no image"),
        (stored(Image.new("F", (3, 3)), "TIFF"), r"32-bit pixels \(mode F\)"),
    ):
        with pytest.raises(images.UnreadableImage, match=reason):
            images.open_header(data)
