import json

import pytest

from pipeline import results


def add(run_dir, step: int, fid: float, num_images: int = 100, seed: int = 0, weights: str = "w") -> None:
    protocol = {"num_images": num_images, "seed": seed}
    path = results.path_of(run_dir, f"step-{step:08d}", f"{weights}{step}", protocol)
    results.write(path, {"step": step, "scores": {"inception_score": 1, "fid_x": fid}, "protocol": protocol})


def test_the_best_step_is_that_of_the_lowest_fid(tmp_path):
    assert results.best_step(tmp_path) is None
    for step, fid in ((1, 9.0), (2, 3.0), (3, 4.0)):
        add(tmp_path, step, fid)
    assert results.best_step(tmp_path) == 2


def test_scores_of_different_protocols_are_not_compared(tmp_path):
    """Step 9 was scored with fewer images by a protocol that scored nothing else."""
    for step, fid in ((1, 9.0), (2, 3.0)):
        add(tmp_path, step, fid)
    add(tmp_path, 9, 1.0, num_images=10)
    assert results.best_step(tmp_path) == 2


def test_of_protocols_that_scored_as_many_steps_the_one_of_most_images_counts(tmp_path):
    add(tmp_path, 1, 5.0, num_images=10)
    add(tmp_path, 2, 9.0, num_images=1000)
    assert results.best_step(tmp_path) == 2


def test_two_results_of_a_step_count_by_the_better(tmp_path):
    add(tmp_path, 1, 2.0)
    add(tmp_path, 1, 9.0, weights="after a rollback")
    add(tmp_path, 2, 5.0)
    assert results.best_step(tmp_path) == 1


def test_a_failed_evaluation_is_never_the_best(tmp_path):
    add(tmp_path, 1, 5.0)
    path = results.path_of(tmp_path, "step-00000002", "w2", {})
    results.write(path, {"step": 2, "error": "collapsed", "protocol": {}})
    assert results.best_step(tmp_path) == 1


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
        results.best_step(tmp_path)
