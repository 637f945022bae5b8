"""Samples the generator in this folder: `python sample.py --classes 0 3 --columns 8 --out images.png`.

Needs torch and safetensors, and nothing else.
"""

import argparse
import json
import struct
import zlib
from pathlib import Path

import torch

import sagan

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Parses the command line and writes one PNG: a row for each class."""
    parser = argparse.ArgumentParser(description="Writes samples of the generator in this folder as one PNG.")
    parser.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="numbers or names; default: 0 to 7")
    parser.add_argument("--columns", type=int, default=8, metavar="N", help="images of each class; default 8")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default 0")
    parser.add_argument("--out", type=Path, default=Path("images.png"), metavar="FILE", help="default images.png")
    arguments = parser.parse_args()

    generator = sagan.load(HERE)
    names = json.loads((HERE / "config.json").read_text())["class_names"]
    classes = [number_of(text, names, generator.num_classes) for text in arguments.classes]
    classes = classes or list(range(min(8, generator.num_classes)))
    rows = len(classes) or 8
    z = torch.randn(rows, arguments.columns, generator.z_dim, generator=torch.Generator().manual_seed(arguments.seed))
    labels: list[torch.Tensor | None] = [torch.full((arguments.columns,), label) for label in classes]
    labels = labels or [None] * rows
    with torch.no_grad():
        images = torch.stack([generator(noise, label) for noise, label in zip(z, labels, strict=True)])
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)  # (rows, columns, 3, H, W)
    write_png(pixels.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1), arguments.out)
    print(f"{arguments.out}: {rows} x {arguments.columns} images of {generator.resolution} px")


def number_of(text: str, names: list[str], num_classes: int) -> int:
    """Returns the label of a class given by number or name."""
    if text in names and not text.isdecimal():
        return names.index(text)
    if text.isdecimal() and int(text) < num_classes:
        return int(text)
    raise SystemExit(f"error: no class {text!r}; there are 0 to {num_classes - 1}: {', '.join(names[:5])}, ...")


def write_png(picture: torch.Tensor, path: Path) -> None:
    """Writes (H, W, 3) uint8 as PNG, by the standard library alone."""
    height, width, _ = picture.shape
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), picture.flatten(1)], 1)  # each row: filter 0, pixels

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(rows.flatten().tolist()))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


if __name__ == "__main__":
    main()
