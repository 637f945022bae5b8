"""Training runs of a tiny model in this process: resume, stop, damage, non-finite numbers."""

import os
import re
import shutil
import signal
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

import sagan
from pipeline import checkpoint, locks, results, snapshots
from pipeline.backend import Player
from pipeline.checkpoint import CheckpointError
from pipeline.config import Config, ConfigError, load_config
from pipeline.gan import Gan
from pipeline.health import NonFiniteError
from pipeline.journal import read_records
from pipeline.manifest import ShardSetError
from pipeline.networks import build_generator
from pipeline.trainer import Trainer, train

YAML = """
run: {{name: tiny, dir: {directory}}}
data: {{shards: {shards}, num_workers: 0}}
model: {{resolution: 16, num_classes: 3, attention_resolution: 8, g_channels: 2, d_channels: 4, z_dim: 8}}
train: {{steps: 6, global_batch_size: 12, log_every_steps: 2, checkpoint_every_steps: 2, sample_every_steps: 6}}
ema: {{decay: 0.9, start_step: 2}}
tracking: {{enabled: false}}
"""


@pytest.fixture
def configure(tmp_path, tiny_shards):
    (tmp_path / "config.yaml").write_text(YAML.format(directory=tmp_path, shards=tiny_shards))

    def with_overrides(*overrides: str) -> Config:
        return load_config(tmp_path / "config.yaml", overrides)

    return with_overrides


def last_checkpoint(config: Config) -> checkpoint.Checkpoint:
    path, problems = checkpoint.newest(config.run_dir)
    assert path is not None
    assert problems == []
    return checkpoint.load(path)


def assert_same(one: checkpoint.Checkpoint, other: checkpoint.Checkpoint) -> None:
    """Every parameter, buffer and moment, bit for bit."""
    assert checkpoint.digests(one.networks) == checkpoint.digests(other.networks)
    for name, optimizer in one.optimizers.items():
        for index, moments in optimizer["state"].items():
            for key, value in moments.items():
                assert torch.equal(value, other.optimizers[name]["state"][index][key]), (name, index, key)


def test_a_run_leaves_checkpoints_samples_a_journal_and_done(configure, capsys):
    config = configure()
    train(config)
    assert [path.name for path in checkpoint.published(config.run_dir)] == [
        "step-00000002", "step-00000004", "step-00000006"
    ]  # fmt: skip
    assert (config.run_dir / "DONE").read_text() == "6\n"
    with Image.open(config.run_dir / "samples" / "step-00000006.png") as grid:
        assert grid.size == (4 * 8 * 16, 4 * 3 * 16), "8 columns, a row per class, enlarged for the eye"
    with Image.open(config.run_dir / "attention" / "step-00000006.png") as figure:
        assert figure.height == 2 + 3 * 2 * (96 + 2), "rows of G and of D for each of three classes"
    records, _ = read_records(config.run_dir / "journal.jsonl")
    gains = {"attention/generator_attention", "attention/discriminator_attention"}
    assert [record["step"] for record in records if gains <= record.get("metrics", {}).keys()] == [2, 4, 6]
    found = last_checkpoint(config)
    state = found.state
    assert (state.step, state.images_seen, state.next_batch_number) == (6, 72, 6)
    said = capsys.readouterr()
    assert re.search(r"data +\S+ \S+, 90 images, 16 px, webp", said.out)
    assert "3, 30 to 30 images each" in said.out
    assert "12 images = 1 micro-batch(es) x 1 process(es) x 12" in said.out
    assert re.search(r"step 6/6 \| D \S+ G \S+ .* images/s, data wait", said.err)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(configure):
    whole, parts = configure("run.name=whole"), configure("run.name=parts")
    train(whole)
    train(configure("run.name=parts", "train.steps=4"))
    train(parts)
    assert_same(last_checkpoint(whole), last_checkpoint(parts))


def test_a_finished_run_says_so_and_an_extended_one_goes_on(configure, capsys):
    train(configure("train.steps=2"))
    train(configure("train.steps=2"))
    assert "step 2 of 2 is done; raise train.steps to go on" in capsys.readouterr().err
    train(configure("train.steps=4"))
    assert last_checkpoint(configure()).state.step == 4


@pytest.mark.parametrize("lost", ["DONE", "model"])
def test_what_a_kill_after_the_last_checkpoint_left_undone_is_done_by_the_same_command(configure, lost):
    config = configure("train.steps=2")
    train(config)
    weights = (config.run_dir / "model" / "model.safetensors").read_bytes()
    (config.run_dir / "DONE").unlink()
    if lost == "model":
        shutil.rmtree(config.run_dir / "model")
    train(config)
    assert (config.run_dir / "DONE").read_text() == "2\n"
    assert (config.run_dir / "model" / "model.safetensors").read_bytes() == weights
    records, _ = read_records(config.run_dir / "journal.jsonl")
    assert [record["status"] for record in records if "status" in record] == ["RUNNING", "FINISHED"] * 2
    train(config)
    assert len(read_records(config.run_dir / "journal.jsonl")[0]) == len(records), "and once only"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_and_the_same_command_goes_on(configure, monkeypatch, capsys, number):
    whole, stopped = configure("run.name=whole"), configure("run.name=stopped")
    train(whole)
    one_step = Trainer._one_step

    def signalled(self, batches):
        one_step(self, batches)
        if self.step == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_one_step", signalled)
    train(stopped)
    monkeypatch.undo()
    # The vote on stopping travels while a step runs, so the stop comes one step later, on every rank alike.
    assert last_checkpoint(stopped).state.step == 4
    assert f"stopped by {signal.Signals(number).name} at step 4" in capsys.readouterr().err
    assert not (stopped.run_dir / "DONE").exists()
    train(stopped)
    assert_same(last_checkpoint(whole), last_checkpoint(stopped))


def test_a_directory_in_which_another_training_is_at_work_is_refused_and_left_alone(configure, monkeypatch):
    config = configure("train.steps=2")
    monkeypatch.setattr(locks, "_WAIT_SECONDS", 0.0)
    with locks.only_training(config.run_dir, print, lambda: True), pytest.raises(locks.RunTakenError):
        train(config)
    assert [path.name for path in config.run_dir.iterdir()] == ["training.lock"]
    train(config)
    assert (config.run_dir / "DONE").exists()


def test_changed_hyperparameters_are_listed_and_refused_unless_accepted(configure):
    train(configure("train.steps=2"))
    with pytest.raises(ConfigError) as error:
        train(configure("optimizer.lr_g=0.5", "ema.decay=0.5"))
    assert "ema.decay: 0.9 -> 0.5\n  optimizer.lr_g: 0.0001 -> 0.5" in str(error.value)
    assert "run.accept_changes=[ema.decay, optimizer.lr_g]" in str(error.value)
    train(configure("ema.decay=0.5", "run.accept_changes=[ema.decay]", "train.steps=4"))
    assert last_checkpoint(configure()).state.step == 4


def test_an_accepted_learning_rate_is_the_one_that_trains(configure):
    """Adam's state dict carries the learning rate of its day; the configuration decides."""
    train(configure("train.steps=2"))
    train(configure("optimizer.lr_g=0.5", "run.accept_changes=[optimizer.lr_g]", "train.steps=4"))
    optimizer = last_checkpoint(configure()).optimizers["generator"]
    assert optimizer["param_groups"][0]["lr"] == 0.5
    assert optimizer["state"][0]["step"] == 4, "the moments go on"


def test_another_memory_layout_takes_the_moments_in_order(configure):
    """Fused Adam pairs weights and moments by memory, and channels_last may change between runs."""
    whole, mixed = configure("run.name=whole"), configure("run.name=mixed")
    train(whole)
    train(configure("run.name=mixed", "train.steps=4", "train.channels_last=true"))
    train(configure("run.name=mixed", "train.channels_last=false"))
    one, other = last_checkpoint(whole), last_checkpoint(mixed)
    for index, moments in one.optimizers["discriminator"]["state"].items():
        found = other.optimizers["discriminator"]["state"][index]["exp_avg_sq"]
        torch.testing.assert_close(found, moments["exp_avg_sq"], rtol=1e-2, atol=1e-6)


def test_another_data_set_is_refused(configure, monkeypatch):
    train(configure("train.steps=2"))
    path = checkpoint.published(configure().run_dir)[-1]
    found = checkpoint.load(path)
    monkeypatch.setattr(checkpoint, "load", lambda _: found)
    object.__setattr__(found.state, "dataset_id", "0" * 64)
    with pytest.raises(ConfigError, match="was trained on data set 000000000000"):
        train(configure())


def test_a_checkpoint_cut_in_half_is_named_and_the_one_before_is_taken(configure, capsys):
    whole, cut = configure("run.name=whole"), configure("run.name=cut")
    train(whole)
    train(configure("run.name=cut", "train.steps=4"))
    victim = cut.run_dir / "checkpoints" / "step-00000004" / "generator.safetensors"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    train(cut)
    said = capsys.readouterr().err
    assert "step-00000004 is damaged (generator.safetensors" in said
    assert "resumed from" in said
    assert "step-00000002" in said
    assert_same(last_checkpoint(whole), last_checkpoint(cut))


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_in_place(configure, monkeypatch):
    config = configure()
    save = checkpoint.safetensors.torch.save_file

    def full_from_step_4(tensors, path):
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full_from_step_4)
    with pytest.raises(CheckpointError, match=r"step-00000004 could not be saved: the disk is full"):
        train(config)
    monkeypatch.undo()
    assert last_checkpoint(config).state.step == 2
    train(config)
    assert last_checkpoint(config).state.step == 6


def poison(monkeypatch, step: int, network: str, kind: str, times: int) -> None:
    """Makes the loss, a gradient or a BatchNorm statistic of one update NaN, `times` times over."""
    update, left = Player.update, [times]

    def poisoned(self, at_step, loss):
        if self.name == network and at_step == step and left[0]:
            left[0] -= 1
            if kind == "gradient":
                next(self.module.parameters()).grad[0] = float("nan")
            elif kind == "loss":
                loss = loss * float("nan")
            else:
                dict(self.module.named_buffers())["final_norm.running_mean"][0] = float("nan")
        return update(self, at_step, loss)

    monkeypatch.setattr(Player, "update", poisoned)


@pytest.mark.parametrize(
    ("network", "kind", "said"),
    [
        ("generator", "gradient", r"generator went non-finite at step 3: gradient of \S+"),
        ("discriminator", "gradient", r"discriminator went non-finite at step 3: gradient of \S+"),
        ("discriminator", "loss", "discriminator went non-finite at step 3: loss"),
        ("generator", "buffer", "generator went non-finite at step 4: buffer final_norm.running_mean"),
    ],
)
def test_a_fault_is_rolled_back_and_other_noise_drawn(configure, monkeypatch, capsys, network, kind, said):
    """Steps 3 and 4 are drawn anew, the others once; the checkpoint remembers, so a resume draws the same."""
    drawn = []
    draw = Gan._draw

    def noted(self, *purpose):
        noises = draw(self, *purpose)
        drawn.append((purpose[2], purpose[0], noises[0].z.clone()))
        return noises

    monkeypatch.setattr(Gan, "_draw", noted)
    struck = configure("run.name=struck", "tracking.enabled=false")
    with monkeypatch.context() as poisoned:
        poison(poisoned, 3, network, kind, times=1)
        train(struck)
    assert re.search(rf"{said}; rolled back to \S+step-00000002 \(1 of 3\), steps 3 to 4 draw", capsys.readouterr().err)
    assert last_checkpoint(struck).state.redrawn == ((3, 4),)
    by_step = {step: [z for at, purpose, z in drawn if (at, purpose) == (step, "g_z")] for step in range(1, 7)}
    assert [len(by_step[step]) for step in range(1, 7)] == [1, 1, 2, 2, 1, 1]
    assert not torch.equal(*by_step[3]) and not torch.equal(*by_step[4])
    records, _ = read_records(struck.run_dir / "journal.jsonl")
    tags = {name: text for record in records for name, text in record.get("tags", {}).items()}
    assert re.search(said, tags["rollback.1"])

    checkpoint.published(struck.run_dir)[-1].rename(struck.run_dir / "six")
    train(struck)  # from step 4, with what the checkpoint remembers
    assert_same(last_checkpoint(struck), checkpoint.load(struck.run_dir / "six"))


def test_a_fault_that_comes_back_stops_the_run(configure, monkeypatch):
    poison(monkeypatch, 3, "discriminator", "gradient", times=99)
    with pytest.raises(NonFiniteError, match=r"discriminator went non-finite at step 3.*after 2 rollback"):
        train(configure("health.max_rollbacks=2"))
    assert last_checkpoint(configure()).state.step == 2, "nothing non-finite was saved"


def test_rollback_can_be_switched_off(configure, monkeypatch):
    poison(monkeypatch, 3, "generator", "gradient", times=1)
    with pytest.raises(NonFiniteError, match=r"health\.on_failure=stop"):
        train(configure("health.on_failure=stop"))


@pytest.mark.parametrize("fault", ["flipped byte", "missing shard"])
def test_damaged_data_ends_the_run_with_the_name_of_the_shard(configure, tmp_path, tiny_shards, fault):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_shards, broken)
    victim = broken / "shard-000001.tar"
    if fault == "missing shard":
        victim.unlink()
    else:
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    with pytest.raises(ShardSetError, match=r"shard-000001\.tar"):
        train(configure(f"data.shards={broken}"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_classes=4", "model.num_classes is 4, but data.shards=.* has 3 classes"),
        ("model.resolution=32", "holds images of 16 px; build shards with --size 32"),
        ("train.global_batch_size=128", "holds 90 images; use a smaller batch"),
        ("data.shards=nowhere", "nowhere"),
    ],
)
def test_what_does_not_fit_the_data_is_said_before_anything_is_built(configure, override, expected):
    with pytest.raises((ConfigError, ShardSetError), match=expected):
        train(configure(override))
    assert not configure().run_dir.exists()


def test_bf16_autocast_trains_and_keeps_float32_weights(configure):
    config = configure("train.precision=bf16", "train.steps=2")
    train(config)
    assert {tensor.dtype for tensor in last_checkpoint(config).networks["ema"].values()} <= {torch.float32, torch.int64}


def test_an_unconditional_model_trains_on_the_same_pipeline(configure, tmp_path):
    from pipeline import shards, sources

    flat = tmp_path / "faces"
    flat.mkdir()
    for number in range(16):
        Image.new("RGB", (16, 16), (number * 10, 40, 200 - number)).save(flat / f"{number:02d}.png")
    (tmp_path / "set").mkdir()
    shards.build(shards.plan(sources.list_source(flat), image_size=16), tmp_path / "set")
    config = configure(f"data.shards={tmp_path / 'set'}", "model.num_classes=0", "train.steps=2")
    train(config)
    assert last_checkpoint(config).state.step == 2


def test_batches_that_the_processes_cannot_share_are_refused(configure, tiny_shards):
    from pipeline.manifest import open_shard_set
    from pipeline.summary import check_data

    shard_set = open_shard_set(str(tiny_shards))
    check_data(configure(), shard_set, world_size=4)
    with pytest.raises(ConfigError, match=r"12 images cannot be dealt to 5 processes.*\[1, 2, 3, 4, 6, 12\]"):
        check_data(configure(), shard_set, world_size=5)


def test_the_directory_of_a_run_tells_how_to_make_it_again(configure, tiny_shards):
    config = configure("train.steps=2")
    train(config)
    assert load_config(Path(config.run_dir) / "config.yaml") == config
    assert (config.run_dir / "dataset_manifest.json").read_bytes() == (tiny_shards / "manifest.json").read_bytes()
    assert f"torch=={version('torch')}" in (config.run_dir / "environment.txt").read_text().splitlines()
    sent, _ = read_records(config.run_dir / "journals" / "files-samples.jsonl")
    names = {"config.yaml", "environment.txt", "dataset_manifest.json"}
    assert [set(record["files"]) for record in sent if "files" in record] == [names]


def test_a_finished_run_leaves_its_average_as_a_folder_and_an_extended_one_a_new_one(configure):
    for steps in (2, 4):
        config = configure(f"train.steps={steps}")
        train(config)
        generator = build_generator(config)
        generator.load_state_dict(last_checkpoint(config).networks["ema"])
        z, labels = torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])
        exported = sagan.load(config.run_dir / "model")
        torch.testing.assert_close(exported(z, labels), generator.eval()(z, labels), rtol=0, atol=1e-5)
    told, _ = read_records(config.run_dir / "journals" / "files-samples.jsonl")
    models = [(record["step"], record["models"]) for record in told if "models" in record]
    assert models == [(2, {"model": "sagan-tiny"}), (4, {"model": "sagan-tiny"})]


def test_training_leaves_snapshots_apart_from_checkpoints(configure):
    config = configure("evaluation.every_steps=4", "train.keep_checkpoints=1")
    train(config)
    found = snapshots.published(config.run_dir)
    assert [checkpoint.step_of(path) for path in found] == [4, 6]  # each 4th, and the last
    at_the_end = checkpoint.digests(last_checkpoint(config).networks)
    ema = safetensors.torch.load_file(found[-1] / "ema.safetensors")
    assert checkpoint.digests({"ema": ema}).items() <= at_the_end.items()


def test_the_best_checkpoint_by_fid_outlives_pruning(configure):
    """By results of its own weights: those at step 4 were of weights that the run gave up."""
    config = configure("train.keep_checkpoints=1", "train.steps=2")
    train(config)
    [first] = checkpoint.published(config.run_dir)
    for step, fid, weights in ((2, 5.0, checkpoint.hashes_of(first)["ema.safetensors"]), (4, 1.0, "given up")):
        result = {
            "step": step, "scores": {"fid": fid}, "protocol": {"num_images": 10},
            "provenance": {"weights_sha256": weights},
        }  # fmt: skip
        results.write(config.run_dir / "evaluations" / f"step-{step:08d}" / "key.json", result)
    train(configure("train.keep_checkpoints=1"))
    assert [checkpoint.step_of(path) for path in checkpoint.published(config.run_dir)] == [2, 6]


def test_a_rollback_takes_back_the_snapshots_of_the_steps_it_gives_up(configure, monkeypatch):
    """Step 3 is left in a snapshot, step 4 goes wrong, and training goes back to step 2 and on by another way."""
    config, made, again, draw, save = configure("evaluation.every_steps=3"), [], [], Gan._draw, snapshots.save

    def noted_draw(self, *purpose):
        _, _, step, _, attempt = purpose
        if attempt and step == 3:
            again.append(step)
            assert snapshots.published(config.run_dir) == []  # nothing an evaluation could take for the run's
        return draw(self, *purpose)

    def noted_save(*arguments):
        path = save(*arguments)
        made.append((checkpoint.step_of(path), checkpoint.hashes_of(path)["ema.safetensors"]))
        return path

    monkeypatch.setattr(Gan, "_draw", noted_draw)
    monkeypatch.setattr(snapshots, "save", noted_save)
    poison(monkeypatch, 4, "generator", "gradient", times=1)
    train(config)
    assert again and [step for step, _ in made] == [3, 3, 6]
    assert made[0][1] != made[1][1]
    found = [
        (checkpoint.step_of(p), checkpoint.hashes_of(p)["ema.safetensors"]) for p in snapshots.published(config.run_dir)
    ]
    assert found == made[1:]


def test_a_resume_makes_later_snapshots_anew(configure):
    """As after a kill between a snapshot and the checkpoint, and on another number of processes, say."""
    config = configure("evaluation.every_steps=3")
    train(config)
    of_3, of_6 = snapshots.published(config.run_dir)
    before = checkpoint.hashes_of(of_3)
    for path in checkpoint.published(config.run_dir)[1:]:
        checkpoint.remove(path)
    state, networks = last_checkpoint(config).state, last_checkpoint(config).networks
    for step in (3, 5):
        snapshots.save(config.run_dir, replace(state, step=step), networks)
    assert checkpoint.hashes_of(of_3)["ema.safetensors"] != before["ema.safetensors"]
    train(config)
    assert snapshots.published(config.run_dir) == [of_3, of_6]
    assert checkpoint.hashes_of(of_3) == before


def test_a_damaged_result_file_stops_no_training(configure, capsys):
    config = configure("train.keep_checkpoints=1")
    path = config.run_dir / "evaluations" / "step-00000002" / "key.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    train(config)
    assert "the best checkpoint is not known" in capsys.readouterr().err
