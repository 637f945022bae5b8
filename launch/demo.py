"""The whole chain on a small real data set: `make demo`.

Writes scikit-learn's handwritten digits as image files, then runs the commands a user would: shards, training in two
processes, evaluation in two processes. Each command is printed before it runs. Started again, it goes on where it was.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from launch.errors import run

IMAGES, SHARDS, RUN = Path("demo_data/digits"), Path("demo_data/shards"), Path("runs/demo")
NUM_JUDGED = 500
RECOGNISED, VARIETY = 0.8, 0.4  # what the recipe gives at least
LAUNCH = ["accelerate", "launch", "--config_file", "configs/accelerate/cpu_two_processes.yaml"]


def main() -> int:
    """Runs the demo and prints where its results are."""
    started = time.monotonic()
    from pipeline import digits

    size = 16
    print(f"demo: {digits.write_folders(IMAGES, size):,} handwritten digits -> {IMAGES}", flush=True)
    shards = ["python", "launch/shards.py", "build", "--source", str(IMAGES), "--destination", str(SHARDS)]
    _run([*shards, "--size", str(size)])
    _run([*LAUNCH, "launch/train.py", "configs/demo.yaml", *digits.fastest_precision()])
    _run([*LAUNCH, "launch/evaluate.py", str(RUN)])
    recognised, varieties = digits.judge_run(RUN, NUM_JUDGED)
    grid = max((RUN / "samples").glob("step-*.png"))
    result = max((RUN / "evaluations").glob("step-*/*.json"))
    scores = ", ".join(f"{name} {value:.4g}" for name, value in json.loads(result.read_text())["scores"].items())
    lines = {
        "sample grid": f"{grid}",
        "scores": f"{scores} (smoke scores: they compare with nothing), {result}",
        "recognised": f"{recognised:.1%} of {NUM_JUDGED} samples are read as the asked digit by a classifier fitted on "
        f"the real ones ({RECOGNISED:.0%} or more expected)",
        "variety": f"{varieties.mean():.2f} of the real digits' mean pairwise distance, {varieties.min():.2f} in the "
        f"poorest class ({VARIETY} or more expected)",
        "compare runs": "make ui",
    }
    print(f"\ndemo done in {(time.monotonic() - started) / 60:.1f} minutes")
    for name, text in lines.items():
        print(f"  {name:<13} {text}")
    return 0 if recognised >= RECOGNISED and varieties.min() >= VARIETY else 1


def _run(command: list[str]) -> None:
    """Prints a command, runs it with this environment's programs, and ends the demo if it fails."""
    print(f"\n$ {' '.join(command)}", flush=True)
    programs = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"}
    status = subprocess.run(command, env=environment).returncode
    if status:
        sys.exit(f"error: this command ended with status {status}; its own message is above. `make demo` goes on here")


if __name__ == "__main__":
    run(main)
