"""Shows what a generator does: `python launch/sample.py RUN_DIR`."""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from launch.arguments import at_least
from launch.errors import report, run

_TEXTS = {
    "grid": ("Samples.", "A row per class, each column with noise of its own; the same noise for every generator."),
    "interpolation": ("From one noise to another.", "On the arc between two draws, a row per class."),
    "classes": ("From one class to the next.", "The noise stays; gains and biases of batch norm are mixed."),
    "truncation": ("Truncation.", "The same samples with every number of the noise kept below a threshold."),
    "attention": (
        "Attention.",
        "The first cell has five points. Each of the others shows, in the colour of its point, where the generator "
        "(G) or the discriminator (D) looks from there: full colour is the largest weight of that map, an even "
        "colour means that it looks everywhere alike.",
    ),
    "neighbours": (
        "Nearest real images.",
        "Each sample, framed, and the training images nearest to it in feature space. Copies would be seen here.",
    ),
    "animation": ("Training.", "The run's sample grids, step by step, on the same noise."),
}

_EPILOG = """\
examples:
  all there is             python launch/sample.py runs/imagenet128
  some classes             python launch/sample.py runs/imagenet128 grid --classes "golden retriever" 281 n02123045
  look from other points   python launch/sample.py runs/imagenet128 attention --points 0.5,0.2 0.1,0.9
  the best by FID          python launch/sample.py runs/imagenet128 --checkpoint best --out pictures
  one checkpoint           python launch/sample.py runs/imagenet128/checkpoints/step-00100000 grid attention
  an export                python launch/sample.py exports/imagenet128 grid truncation --truncations 1.5 1.0 0.5

Figures: grid, interpolation (in z), classes (between them), truncation, attention, neighbours (nearest real images in
feature space; needs the shards), animation (over training steps). None named: all that this generator can give.
OUT gets a PNG of each, and index.html with all of them, which opens in any browser and needs no other file.
"""


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, draws, and returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    if unknown := [name for name in options.figures if name not in _TEXTS]:
        print(f"error: no figure {', '.join(unknown)}; there are {', '.join(_TEXTS)}", file=sys.stderr)
        return 2
    try:
        return _draw(options, sys.argv if arguments is None else ["launch/sample.py", *arguments])
    except (ValueError, OSError) as error:  # all that a person can mend is one of these
        return report(error)


def _draw(options: argparse.Namespace, command: list[str]) -> int:
    # Imported late, so that --help and a mistyped figure answer at once.
    import torch

    from pipeline import attention, contact_sheet, pictures, sampling
    from pipeline.opened import open_discriminator, open_generator

    device = torch.device("cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu")
    if options.device != "auto":
        device = torch.device(options.device)
    if len(options.points) > len(attention.COLOURS):
        raise ValueError(f"--points takes {len(attention.COLOURS)} at most, one for each colour")
    opened = open_generator(options.where, options.checkpoint, options.weights, device)
    wish = pictures.Wish(
        pictures.choose_classes(opened, options.classes),
        options.columns,
        options.seed,
        tuple(options.points) or pictures.Wish.places,
        tuple(options.truncations) or pictures.TRUNCATIONS,
    )
    few = wish if options.classes else replace(wish, classes=tuple(sampling.few(list(wish.classes), 4)))
    out = options.out or (opened.run_dir or Path(".")) / "pictures" / f"step-{opened.step:08d}"
    out.mkdir(parents=True, exist_ok=True)
    for remark in opened.remarks:
        print(remark)
    makers = {
        "grid": lambda: pictures.grid(opened, wish),
        "interpolation": lambda: pictures.interpolation(opened, wish),
        "classes": lambda: pictures.between_classes(opened, wish),
        "truncation": lambda: pictures.truncation(opened, wish),
        "attention": lambda: pictures.attention_figure(opened, open_discriminator(opened, device), few),
        "neighbours": lambda: pictures.neighbours(opened, wish, options.features),
    }
    entries = []
    for name in options.figures or _TEXTS:
        path = out / f"{name}.{'webp' if name == 'animation' else 'png'}"
        try:
            if name == "animation":
                pictures.animation(opened, path)
            else:
                makers[name]().save(path)
        except ValueError as error:
            if options.figures:
                raise
            print(f"{name}: left out, {error}")
            continue
        print(path)
        entries.append(contact_sheet.Entry(path, *_TEXTS[name]))
    facts = {
        "generator": f"{opened.path}, step {opened.step:,}, {opened.weights} weights {opened.weights_sha256[:12]}",
        "trained on": f"data set {opened.dataset_id[:12]}",
        "made by": f"python {shlex.join(command)}",
    }
    contact_sheet.write(out / "index.html", f"{opened.path.name} of {options.where}", facts, entries)
    print(out / "index.html")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/sample.py",
        description="Draws what a generator does, as PNG files and one HTML page.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("where", type=Path, metavar="WHERE", help="a run's directory, a checkpoint in it, or an export")
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=", ".join(_TEXTS))
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="CLASS",
        help="numbers or names; default: all of up to ten, else eight of them",
    )  # fmt: skip
    parser.add_argument("--columns", type=at_least(2), default=8, metavar="N", help="images in a row; default 8")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="S", help="of the noise; default 0")
    parser.add_argument(
        "--truncations", nargs="+", type=_positive, default=[], metavar="T", help="thresholds of |z|, a row each"
    )
    parser.add_argument(
        "--points", nargs="+", type=_point, default=[], metavar="X,Y",
        help="up to five places to look from, as shares of width and height: 0,0 is the upper left, 0.5,0.5 the middle",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", default="newest", metavar="newest|best|STEP", help="of a run; default: the newest"
    )
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="default: ema, the average")
    parser.add_argument(
        "--features", metavar="KIND", help="of neighbours: inception, random, FILE.pt or module:function; default: "
        "the run's evaluation.features",
    )  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: cuda if there is")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/pictures/step-N, or ./pictures/step-N")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be X,Y such as 0.5,0.5, got {text!r}") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"X and Y must lie between 0 and 1, got {text}")
    return x, y


if __name__ == "__main__":
    run(main)
