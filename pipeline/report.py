"""What becomes of a result: words on the screen, points and files in MLflow."""

from pathlib import Path
from typing import Any

from pipeline import results, subject, tracking
from pipeline.config import Config
from pipeline.mlflow_sender import count_unsent
from pipeline.results import Result
from pipeline.shard_file import PART
from pipeline.world import World


def tell(run_dir: Path, config: Config, path: Path) -> str | None:
    """Prints a result and hands it to MLflow, which records it once however often it is told; returns its error."""
    result = results.read(path)
    print(describe(result, path), flush=True)
    tracking.log_evaluation(config, run_dir, **_for_tracking(result, path))
    return "; ".join([*filter(None, [result.get("error")]), *result.get("not_scored", ())]) or None


def _for_tracking(result: Result, path: Path) -> dict[str, Any]:
    metrics = {f"eval/{name}": score for name, score in result.get("scores", {}).items()}
    beside = sorted(each for each in path.parent.glob(f"{path.stem}-*") if each.suffix != PART)
    files, weights = [path, *beside], result["provenance"]["weights_sha256"]
    return {"step": result["step"], "metrics": metrics, "files": files, "weights": weights}


def sync(run_dir: Path, config: Config) -> int:
    """Tells MLflow of every result it has not been told of; called on every rank.

    Returns:
        Exit status: 1 if something that should be could not be sent. On other ranks than 0 always 0.
    """
    world, num_left = World("cpu"), 0
    if world.is_main:
        found = {path: results.read(path) for path in sorted(results.directory(run_dir).glob("*/*.json"))}
        for path, result in found.items():
            # Weights that the run gave up since are told no more.
            if subject.of_the_run(run_dir, result["step"], result["provenance"]["weights_sha256"]) is not False:
                tracking.record_evaluation(run_dir, **_for_tracking(result, path))
        tracking.send_unsent(config, run_dir)
        points, files = count_unsent(run_dir)
        print(f"{len(found)} results of {run_dir}; {points} points and {files} files are not sent yet")
        num_left = points + files
    world.shutdown()
    return int(config.tracking.enabled and num_left > 0)


def describe(result: Result, path: Path) -> str:
    """Returns a result in words: the scores, why they are not the official ones, where the file is."""
    protocol, real = result["protocol"], result["protocol"]["reference"]
    what = {"ema": "samples of the EMA generator", "raw": "samples of the raw generator", "none": "real images"}
    lines = [
        f"step {result['step']:,}: {protocol['num_images']:,} {what[protocol['weights']]} against the "
        f"{real['num_images']:,} images of {real['dataset']} ({real['split']}), {protocol['extractor']} features"
    ]
    if "error" in result:
        return "\n".join([*lines, f"  no scores: {result['error']}", f"result: {path}"])
    width = max(len(name) for name in result["scores"])
    lines += [f"  {name:<{width}}  {score:.4f}" for name, score in result["scores"].items()]
    for point in result.get("truncation_curve", ()):
        if "error" in point:
            continue  # among what was not scored, below
        lines += ["  truncation " + ", ".join(f"{name} {value:.4g}" for name, value in point.items() if value)]
    lines += [f"not scored: {failure}" for failure in result.get("not_scored", ())]
    lines += [f"not official: {reason}" for reason in result["not_official_because"]]
    lines += [f"note: {remark}" for remark in result["remarks"]]
    return "\n".join([*lines, f"result: {path}"])
