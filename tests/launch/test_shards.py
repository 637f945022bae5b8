import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import shards
from pipeline.manifest import open_shard_set


@pytest.fixture
def tree(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for label, per_class in enumerate([3, 5, 4]):
        (tmp_path / f"flowers/train/class{label}").mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"flowers/train/class{label}/{number}.png")
    return tmp_path / "flowers" / "train"


def run(*arguments: object) -> int:
    return shards.main([str(argument) for argument in arguments])


def build(source: Path, destination: Path, *more: object) -> int:
    return run("build", "--source", source, "--destination", destination, "--size", 16, "--workers", 1, *more)


def test_build_show_and_verify(tree, tmp_path, capsys):
    assert build(tree, tmp_path / "set", "--samples-per-shard", 5) == 0
    out = capsys.readouterr().out
    assert "source: folder of one folder per class, 12 images, 3 classes" in out
    assert "built 12 images in" in out
    assert "3 shard(s) built, 0 kept" in out

    assert run("show", tmp_path / "set") == 0
    shown = capsys.readouterr().out
    for line in (
        "set          flowers, split train",
        "images       12, the complete set",
        "classes      3, label 0 is class0, the last class2",
        "balance      3 / 4 / 5 images per class (min/median/max), entropy 0.9808 of that of equal classes",
        "             most: class1 5, class2 4, class0 3",
        "             least: class0 3, class2 4, class1 5",
        "encoding     webp, lossless",
        "shards       3 of 2 to 5 images",
        "skipped      none",
    ):
        assert line in shown
    assert shown.strip() in out

    assert run("verify", tmp_path / "set") == 0
    assert "sound; 3 shard(s), 3 block(s), 12 images, dataset id" in capsys.readouterr().out


def test_the_same_command_again_does_nothing(tree, tmp_path, capsys):
    build(tree, tmp_path / "set")
    assert build(tree, tmp_path / "set") == 0
    assert "holds this set already, nothing to do" in capsys.readouterr().out
    assert build(tree, tmp_path / "set", "--seed", 1) == 1
    assert "error: " in (err := capsys.readouterr().err)
    assert "holds another set (seed is 0 there and 1 now)" in err


def test_titles_and_raw_are_explained(tree, tmp_path, capsys):
    (tmp_path / "titles.txt").write_text("class0 great rose\nclass1 tulip\nclass2 lily\n")
    options = ["--class-names", tmp_path / "titles.txt", "--encoding", "raw", "--limit-per-class", 2, "--split", "demo"]
    assert build(tree, tmp_path / "set", *options) == 0
    shown = capsys.readouterr().out
    assert "label 0 is class0 great rose" in shown
    assert "np.frombuffer" in shown
    assert "6, not the complete set, at most 2 per class" in shown
    assert "split demo" in shown


def test_an_unconditional_set_says_so(tree, tmp_path, capsys):
    assert build(tree / "class0", tmp_path / "set") == 0
    assert "no labels: an unconditional set" in (out := capsys.readouterr().out)
    assert "classes      none (unconditional)" in out


def test_verify_lists_faults_and_fails(tree, tmp_path, capsys):
    build(tree, tmp_path / "set")
    shard = tmp_path / "set" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert run("verify", tmp_path / "set") == 1
    err = capsys.readouterr().err
    assert "1 fault(s)" in err
    assert "shard-000000.tar: block 0, bytes 0-" in err


def test_a_tar_with_a_file_that_is_no_image(tree, tmp_path, capsys):
    source = tmp_path / "flowers.tar"
    with tarfile.open(source, "w") as tar:
        tar.add(tree, "flowers")
        note = tarfile.TarInfo("flowers/class1/notes.txt")
        note.size = 5
        tar.addfile(note, io.BytesIO(b"water"))
    assert build(source, tmp_path / "set") == 1
    err = capsys.readouterr().err
    assert "1 of 13 images cannot be read (so far), --max-skipped allows 0:\n  class1/notes.txt: no image" in err
    assert build(source, tmp_path / "set", "--max-skipped", 1) == 0
    shown = capsys.readouterr().out
    assert "built 0 images" in shown  # the shard was finished, only not accepted
    assert "0 shard(s) built, 1 kept" in shown
    assert "skipped      1\n             class1/notes.txt: no image" in shown


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--parts", 0),
        ("--size", 0),
        ("--size", -3),
        ("--samples-per-shard", 0),
        ("--workers", 0),
        ("--limit-per-class", 0),
    ],
)
def test_numbers_out_of_range_are_refused(tree, tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as caught:
        build(tree, tmp_path / "set", option, value)
    assert caught.value.code == 2
    assert f"argument {option}: must be at least 1, got {value}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["build", "--size", "8", "--source", "absent", "--destination", "set"],
            "--source absent does not exist; give",
        ),
        (["build", "--size", "8", "--source", ".", "--destination", "gs://b/set"], "is neither a directory nor s3://"),
        (
            ["build", "--size", "8", "--source", ".", "--destination", "set", "--part", "1"],
            "--part needs --parts: --part I --parts N builds part I of N, I from 0 to N - 1",
        ),
        (["build", "--size", "8", "--source", ".", "--destination", "set", "--parts", "2"], "--parts needs --part"),
        (
            ["build", "--size", "8", "--source", ".", "--destination", "set", "--part", "8", "--parts", "8"],
            "--part must be from 0 to 7 with --parts 8, got 8; a job array counts so with --array=0-7",
        ),
        (["merge", "absent"], "holds no set and no build of one"),
        (["show", "absent"], "holds no manifest.json, so it is no finished shard set"),
        (["verify", "absent"], "holds no manifest.json, so it is no finished shard set"),
    ],
)
def test_user_errors_are_one_line_and_exit_1(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    assert shards.main(command) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_part_that_is_no_number_is_refused(tree, tmp_path, capsys):
    """What an array task gives that is none of an array."""
    with pytest.raises(SystemExit):
        build(tree, tmp_path / "set", "--part", "", "--parts", 2)
    assert "argument --part: invalid whole_number value: ''" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build(tree, tmp_path / "set", "--part", -1, "--parts", 2)
    assert "must be at least 0, got -1" in capsys.readouterr().err


def test_parts_say_what_is_missing_and_merge_makes_the_set(tree, tmp_path, capsys):
    destination = tmp_path / "my set"
    options = ["--samples-per-shard", 3, "--parts", 3]
    assert build(tree, destination, *options, "--part", 1) == 0
    out = capsys.readouterr().out
    assert "part 1 of 3: built 3 images in" in out
    assert "still missing: 3 of 4 shards (0,2-3), of part(s) 0,2 of 3" in out
    assert run("merge", destination) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "3 of 4 shards of" in line and "--parts 3 --part 0 (and so on: 0,2, which" in line
    assert build(tree, destination, *options, "--part", 0) == 0
    assert build(tree, destination, *options, "--part", 2) == 0
    assert f"all 4 shards are there; `python launch/shards.py merge '{destination}'` makes the set" in (
        capsys.readouterr().out
    )
    assert run("merge", destination) == 0
    assert "merged 4 shard(s)\n\nset          flowers, split train" in capsys.readouterr().out
    assert run("merge", destination) == 0
    assert "is a set already, nothing to do" in capsys.readouterr().out
    assert build(tree, destination, *options, "--part", 2) == 0
    assert "part 2 of 3: " in (out := capsys.readouterr().out) and "holds this set already, nothing to do" in out
    assert build(tree, tmp_path / "whole", "--samples-per-shard", 3) == 0
    assert {path.name: path.read_bytes() for path in destination.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


def test_two_parts_at_once_as_processes(tree, tmp_path, repo_root):
    """Started together, as tasks of a job array are, with a worker process each beside them."""
    command = [sys.executable, "launch/shards.py", "build", "--source", tree, "--destination", tmp_path / "set"]
    command += ["--size", "16", "--samples-per-shard", "2", "--workers", "2", "--parts", "2", "--part"]
    parts = [
        subprocess.Popen([*map(str, command), part], cwd=repo_root, stdout=subprocess.PIPE, text=True) for part in "01"
    ]
    told = [process.communicate(timeout=100)[0] for process in parts]
    assert [process.returncode for process in parts] == [0, 0]
    assert all("3 shard(s) built, 0 kept" in text for text in told)
    assert "all 6 shards are there" in told[0] + told[1]  # the later one says so
    assert run("merge", tmp_path / "set") == 0
    assert build(tree, tmp_path / "whole", "--samples-per-shard", 2) == 0
    assert open_shard_set(str(tmp_path / "set")).dataset_id == open_shard_set(str(tmp_path / "whole")).dataset_id


@pytest.mark.parametrize("command", [["launch/shards.py"], ["-m", "launch.shards"]])
def test_runs_as_script_and_as_module(repo_root, command):
    done = subprocess.run([sys.executable, *command, "build", "--help"], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--samples-per-shard" in done.stdout
