import json

import pytest
import torch

from pipeline import checkpoint, results, snapshots
from pipeline.checkpoint import TrainerState


def add(run_dir, step: int, fid: float, num_images: int = 100, seed: int = 0, weights: str | None = None) -> None:
    """A result and, of the step's own weights, the snapshot it is of."""
    if weights is None:
        save(run_dir, step, step)
    protocol, sha256 = {"num_images": num_images, "seed": seed}, hash_of(run_dir, step) if weights is None else weights
    path = results.path_of(run_dir, f"step-{step:08d}", sha256, protocol)
    scores = {"inception_score": 1, "fid_x": fid}
    result = {"step": step, "scores": scores, "protocol": protocol, "provenance": {"weights_sha256": sha256}}
    results.write(path, result)


def save(run_dir, step: int, value: float) -> None:
    networks = {name: {"weight": torch.full((3,), float(value))} for name in ("ema", "generator")}
    snapshots.save(run_dir, TrainerState(step, step, step, 1, "d" * 64, 1, {}, {}), networks)


def hash_of(run_dir, step: int) -> str:
    return checkpoint.hashes_of(snapshots.snapshots_dir(run_dir) / f"step-{step:08d}")["ema.safetensors"]


def best(run_dir) -> int | None:
    return results.best_step(run_dir, snapshots.published(run_dir))


def test_the_best_step_is_that_of_the_lowest_fid(tmp_path):
    assert best(tmp_path) is None
    for step, fid in ((1, 9.0), (2, 3.0), (3, 4.0)):
        add(tmp_path, step, fid)
    assert best(tmp_path) == 2


def test_scores_of_different_protocols_are_not_compared(tmp_path):
    """Step 9 was scored with fewer images by a protocol that scored nothing else."""
    for step, fid in ((1, 9.0), (2, 3.0)):
        add(tmp_path, step, fid)
    add(tmp_path, 9, 1.0, num_images=10)
    assert best(tmp_path) == 2


def test_of_protocols_that_scored_as_many_steps_the_one_of_most_images_counts(tmp_path):
    add(tmp_path, 1, 5.0, num_images=10)
    add(tmp_path, 2, 9.0, num_images=1000)
    assert best(tmp_path) == 2


def test_weights_that_the_run_gave_up_are_never_the_best(tmp_path):
    """Those of step 1 went with a rollback; of step 2 nothing is left."""
    add(tmp_path, 1, 1.0, weights="given up")
    add(tmp_path, 1, 9.0)
    add(tmp_path, 2, 2.0)
    checkpoint.remove(snapshots.snapshots_dir(tmp_path) / "step-00000002")
    add(tmp_path, 3, 5.0)
    assert best(tmp_path) == 3


def test_a_failed_evaluation_is_never_the_best(tmp_path):
    add(tmp_path, 1, 5.0)
    path = results.path_of(tmp_path, "step-00000002", "w2", {})
    results.write(path, {"step": 2, "error": "collapsed", "protocol": {}})
    assert best(tmp_path) == 1


def test_the_first_of_two_results_stays(tmp_path):
    path = tmp_path / "step-00000001" / "key.json"
    results.write(path, {"step": 1, "scores": {}, "by": "first"})
    results.write(path, {"step": 1, "scores": {}, "by": "second"})
    assert results.read(path)["by"] == "first"
    assert [item.name for item in path.parent.iterdir()] == ["key.json"]


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"step": 1}), json.dumps({"step": "1", "scores": {}})])
def test_a_file_that_is_no_result_is_named(tmp_path, text):
    path = tmp_path / "evaluations" / "step-00000001" / "key.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"key\.json is no result file .*; remove it"):
        best(tmp_path)
