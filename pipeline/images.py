"""From the bytes of an image file to square RGB pixels, and from pixels to the bytes a shard holds."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError, features

from pipeline.manifest import Encoding

CROP = "centre square of the shorter side"
INTERPOLATION = "lanczos"
EXIF_ORIENTATION = "ignored"  # as every published ImageNet result does: pixels are taken as they are stored

EXTENSIONS: dict[Encoding, str] = {"webp": "webp", "raw": "bin", "png": "png", "jpeg444": "jpg"}


class UnreadableImage(ValueError):
    """Bytes that are no image, or one whose pixels cannot be had; the message is the reason alone."""


def library_versions() -> dict[str, str]:
    """Versions of everything that can change a pixel or a byte of a set."""
    found = {"pillow": features.version("pil"), "numpy": np.__version__}
    found |= {name: features.version(name) for name in ("libjpeg_turbo", "webp", "zlib")}
    return {name: version or "absent" for name, version in found.items()}


def decode(data: bytes) -> Image.Image:
    """Decodes whatever Pillow reads, by content and not by file name; of several frames the first.

    Raises:
        UnreadableImage: no image, a cut or damaged one, or more pixels than Pillow's bound against decompression bombs.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:
        raise _unreadable(error) from error
    return image


def open_header(data: bytes) -> Image.Image:
    """Reads what `decode` reads, but no pixels: format, size and mode are known then, a damage further on is not."""
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:
        raise _unreadable(error) from error
    _check_mode(image)
    return image


def _unreadable(error: Exception) -> UnreadableImage:
    """Pillow's parsers raise every kind: OSError, SyntaxError, struct.error, IndexError, ..."""
    return UnreadableImage(
        "no image" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
    )


def _check_mode(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise UnreadableImage(f"32-bit pixels (mode {image.mode}), whose range is not known")


def describe_crop(pixels: int | None) -> str:
    """Returns what `to_square` does, as manifests say it."""
    return CROP if pixels is None else f"centre square of {pixels} pixels"


def to_square(image: Image.Image, size: int, crop: int | None = None) -> npt.NDArray[np.uint8]:
    """Crops the centre square, converts to RGB, resizes with Lanczos unless the side is right already.

    Grey, palette and CMYK become RGB as Pillow converts them, transparency is dropped, of 16 bits the upper 8 stay.

    Args:
        image: of any size and mode.
        size: side of the result in pixels.
        crop: side of the square that is cut out, in pixels of the image; None: its shorter side.

    Returns:
        (size, size, 3) uint8.

    Raises:
        UnreadableImage: smaller than `crop`, pixels without a known range (32-bit), or a colour space that Pillow does
            not convert.
    """
    width, height = image.size
    side = crop or min(width, height)
    if side > min(width, height):
        raise UnreadableImage(f"{width} x {height} pixels, too small for --crop {side}")
    left, top = (width - side) // 2, (height - side) // 2
    square = _to_rgb(image.crop((left, top, left + side, top + side)))
    if side != size:
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(square)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    _check_mode(image)
    image.info.pop("transparency", None)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise UnreadableImage(str(error)) from error


def encode(pixels: npt.NDArray[np.uint8], encoding: Encoding) -> bytes:
    """Encodes (H, W, 3) uint8: WebP lossless method 0, raw (the H * W * 3 bytes), PNG, or JPEG quality 95, 4:4:4."""
    if encoding == "raw":
        return pixels.tobytes()
    image, file = Image.fromarray(pixels), io.BytesIO()
    match encoding:
        case "webp":
            image.save(file, "WEBP", lossless=True, quality=0, method=0)
        case "png":
            image.save(file, "PNG", compress_level=1)
        case "jpeg444":
            image.save(file, "JPEG", quality=95, subsampling="4:4:4")
        case _:
            raise AssertionError(encoding)
    return file.getvalue()


def histogram(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Counts the values of each channel: (H, W, 3) uint8 -> (3, 256)."""
    return np.array(Image.fromarray(pixels).histogram(), np.int64).reshape(3, 256)
