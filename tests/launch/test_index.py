"""`shards.py index` as a user types it, and what it makes under the real training and evaluation."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset

from launch import shards
from pipeline import checkpoint, s3_store
from pipeline.manifest import open_shard_set

REPO = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> int:
    return shards.main([str(argument) for argument in arguments])


def command(script: str, *arguments: object) -> str:
    """Runs a script in a process of its own; returns its standard output."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, f"launch/{script}.py", *map(str, arguments)],
        cwd=REPO, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def imagenet_samples(source: Path):
    """The images as they are, with the label as a number, as the sets on the hub have them."""
    with tarfile.open(source) as tar:
        for label, member in enumerate(sorted(tar.getmembers(), key=lambda member: member.name)):
            with tarfile.open(fileobj=tar.extractfile(member)) as images:
                for image in images:
                    data = images.extractfile(image).read()
                    yield {
                        "__key__": Path(image.name).stem,
                        "jpg": data,
                        "cls": label,
                        "json": {"filename": image.name},
                    }


@pytest.fixture(scope="module")
def imagenet_tars(shared_data, tmp_path_factory) -> Path:
    """500 original images in 4 shards by stock webdataset."""
    folder = tmp_path_factory.mktemp("imagenet-wds") / "train"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=130, verbose=0) as writer:
        for sample in imagenet_samples(shared_data / "ILSVRC2012_img_train.tar"):
            writer.write(sample)
    return folder


def test_index_shows_what_it_found_and_verify_passes(imagenet_tars, shared_data, tmp_path, capsys):
    (imagenet_tars / "README.md").write_text("cat and dog")
    options = ["--output", tmp_path / "set", "--class-names", shared_data / "imagenet_classes.txt", "--workers", 1]
    assert run("index", imagenet_tars, *options) == 0
    out = capsys.readouterr().out
    total = sum(path.stat().st_size for path in imagenet_tars.glob("*.tar"))
    assert "passed over beside the tars: 1 .md file(s)" in out
    assert f"indexed 500 images, {total:,} bytes in " in out and "MB/s)" in out
    assert run("show", tmp_path / "set") == 0
    shown = capsys.readouterr().out
    assert shown.strip() in out
    for line in (
        f"set          {imagenet_tars.parent.name}, split train",
        "images       500, not the complete set",
        "classes      1,000, label 0 is n01440764 tench, the last n15075141 toilet tissue",
        "pixels       original sizes",
        "encoding     files as they were",
        "formats      500 JPEG; shorter side ",
        "labels       in .cls; ",
        "members      500 cls, 500 jpg, 500 json",
        f"lie in       {tmp_path / 'set'}/../",
        "shards       4 of 110 to 130 images",
        "skipped      none",
    ):
        assert line in shown, line
    assert run("verify", tmp_path / "set") == 0
    assert "sound; 4 shard(s)" in capsys.readouterr().out
    assert run("index", imagenet_tars, *options, "--workers", 2) == 0
    assert "held this very index already" in capsys.readouterr().out


def test_a_refusal_is_one_line_and_exit_1(imagenet_tars, tmp_path, capsys):
    assert run("index", imagenet_tars, "--output", tmp_path / "set", "--image-key", ".PNG", "--max-skipped", 3) == 1
    err = capsys.readouterr().err
    assert "error: 130 sample(s) have no readable image (so far), --max-skipped allows 3:\n" in err
    assert "no .png among its members (.cls, .jpg, .json)" in err and "... and 110 more" in err
    assert run("index", tmp_path, "--output", tmp_path / "set") == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no .tar")


def test_a_complete_split_is_one_by_the_users_word_alone(imagenet_tars, tmp_path, capsys):
    assert run("index", imagenet_tars, "--output", tmp_path / "set", "--complete", "--split", "small") == 0
    assert "split small" in (out := capsys.readouterr().out) and "500, the complete set" in out


def test_numbers_with_gaps_are_pointed_out(tmp_path, imagenet_tars, capsys):
    (tmp_path / "part").mkdir()
    (tmp_path / "part/1.tar").symlink_to(imagenet_tars / "000001.tar")
    (tmp_path / "names.txt").write_text("".join(f"class{k}\n" for k in range(500)))
    assert run("index", tmp_path / "part", "--output", tmp_path / "a") == 0
    out = capsys.readouterr().out
    assert "130 numbers up to 259, so that some classes are not there" in out and "label 0 is 130" in out
    assert run("index", tmp_path / "part", "--output", tmp_path / "b", "--class-names", tmp_path / "names.txt") == 0
    assert "numbers up to" not in capsys.readouterr().out
    assert open_shard_set(str(tmp_path / "b")).index.sample_label.tolist() == list(range(130, 260))


def test_help_teaches():
    text = " ".join(command("shards", "index", "--help").split())
    for word in ("img2dataset", "--class-names", "--check-images", "its header alone is read", "reads each tar once"):
        assert word in text


TINY = ["model.resolution=16", "model.num_classes=500", "model.attention_resolution=8", "model.g_channels=2",
        "model.d_channels=4", "train.global_batch_size=8", "train.num_d_steps=1", "train.steps=4",
        "train.checkpoint_every_steps=2", "train.log_every_steps=1", "data.num_workers=1", "tracking.enabled=false",
        "run.device=cpu", "run.name=adopted"]  # fmt: skip


@pytest.mark.slow
def test_originals_of_webdatasets_writer_are_trained_on_and_evaluated_against(imagenet_tars, tmp_path):
    location = tmp_path / "set"
    command("shards", "index", imagenet_tars, "--output", location, "--workers", 2)
    command("train", "configs/cifar10.yaml", f"data.shards={location}", f"run.dir={tmp_path}", *TINY)
    state = checkpoint.load(checkpoint.published(tmp_path / "adopted")[-1]).state
    dataset_id = open_shard_set(str(location)).dataset_id
    assert (state.step, state.dataset_id) == (4, dataset_id)
    command("evaluate", tmp_path / "adopted", "evaluation.features=random", "evaluation.num_images=40",
            "evaluation.kid_subset_size=20", "evaluation.batch_size=20")  # fmt: skip
    [result] = (tmp_path / "adopted/evaluations").rglob("*.json")
    values = json.loads(result.read_text())
    reference = values["protocol"]["reference"]
    assert (reference["num_images"], reference["dataset_id"], reference["image_size"]) == (500, dataset_id, 16)
    assert (reference["interpolation"], reference["crop"]) == ("lanczos", "centre square of the shorter side")
    assert not any(name == "fid" for name in values["scores"])


@pytest.mark.s3
def test_the_command_on_a_bucket_with_two_workers(imagenet_tars, tmp_path, s3_bucket):
    """Worker processes have the credentials too."""
    location = s3_bucket()
    where = s3_store.parse(location)
    for path in sorted(imagenet_tars.glob("*.tar"))[:2]:
        s3_store.client(where).put_object(Bucket=where.bucket, Key=where.key(path.name), Body=path.read_bytes())
    assert "indexed 260 images" in command("shards", "index", location, "--workers", 2)
    assert "sound; 2 shard(s)" in command("shards", "verify", location)
