"""Exports a run's averaged generator as a folder of its own: `python launch/export.py RUN_DIR OUT`."""

import argparse
from pathlib import Path

from launch.errors import report, run

_EPILOG = """\
examples:
  the newest checkpoint    python launch/export.py runs/imagenet128 exports/imagenet128
  the best by FID          python launch/export.py runs/imagenet128 exports/best --checkpoint best
  without ONNX             python launch/export.py runs/demo exports/demo --no-onnx

OUT holds model.safetensors (spectral norm folded into the weights), config.json, model.onnx, a model card README.md
with the scores of these weights, samples.png, and sample.py with all the code it needs: torch and safetensors are
enough to use it. It can be pushed to a model hub as it is. Three lines sample it:

  import sagan, torch
  generator = sagan.load("exports/imagenet128")
  images = generator(torch.randn(8, generator.z_dim), torch.randint(generator.num_classes, (8,)))
"""


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, exports, and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="launch/export.py",
        description="Writes the averaged generator of a run as a folder that needs neither the run nor this program.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run, or of a checkpoint in it")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    parser.add_argument(
        "--checkpoint", default="newest", metavar="newest|best|STEP", help="of a run; default: the newest"
    )
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="default: ema, the average")
    parser.add_argument("--no-onnx", dest="onnx", action="store_false", help="leave out model.onnx")
    options = parser.parse_args(arguments)
    # Imported late, so that --help answers at once.
    from pipeline import export, opened
    from pipeline.config import ConfigError

    try:
        export.check(options.out, options.onnx)
        found = opened.open_generator(options.run_dir, options.checkpoint, options.weights)
        if found.config is None:
            raise opened.OpenError(f"{options.run_dir} is an export already; copy the folder")
        for line in [*found.remarks, *export.export(found, options.out, onnx=options.onnx)]:
            print(line)
    except (ConfigError, ValueError, OSError) as error:
        return report(error)
    print(f"{options.out}: step {found.step:,} of {options.run_dir}, {export.size_of(options.out) / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    run(main)
