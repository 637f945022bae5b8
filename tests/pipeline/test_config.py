from pathlib import Path

import pytest
import yaml

from pipeline.config import ConfigError, changed_hyperparameters, flatten, load_config, to_dict, to_yaml

MINIMAL = """
run: {name: tiny}
data: {shards: some/where}
model: {resolution: 32, num_classes: 10, attention_resolution: 16}
train: {steps: 10, global_batch_size: 8}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def mistakes(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text), overrides)
    return str(error.value)


def test_overrides_replace_values_in_yaml_syntax(tmp_path):
    config = load_config(
        write(tmp_path, MINIMAL), ["train.steps=20", "optimizer.lr_g=1e-3", "optimizer.betas=[0.5, 0.9]"]
    )
    assert (config.train.steps, config.optimizer.lr_g, config.optimizer.betas) == (20, 1e-3, (0.5, 0.9))


@pytest.mark.parametrize("name", ["2025", "2025-01-31", "no", "1e3", "'quoted'"])
def test_a_run_may_be_called_what_yaml_takes_for_something_else(tmp_path, name):
    config = load_config(write(tmp_path, MINIMAL), [f"run.name={name}"])
    assert config.run.name == name.strip("'")
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_every_mistake_is_reported_at_once_with_the_nearest_name(tmp_path):
    text = mistakes(
        tmp_path, MINIMAL + "optimizer: {lr_gg: 1.0e-4, lr_d: -1.0}\nemma: {decay: 0.9}\n",
        "train.steps=ten", "train.precision=bf61", "train.lr_g=0.1", "data.num_workers=1.5",
    )  # fmt: skip
    assert "7 mistakes" in text
    assert "optimizer.lr_gg: unknown key; did you mean optimizer.lr_g?" in text
    assert "optimizer.lr_d: input should be greater than 0, got -1.0" in text
    assert "emma: unknown key; did you mean ema?" in text
    assert "train.steps: input should be a valid integer, got 'ten'" in text
    assert "train.precision: input should be 'float32', 'bf16' or 'float64', got 'bf61'" in text
    assert "train.lr_g: unknown key; did you mean optimizer.lr_g?" in text
    assert "data.num_workers: input should be a valid integer, got 1.5" in text


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (MINIMAL + "train: {steps: 3}\n", [], "key written twice: train"),
        ("run: {name: a, name: b}\n", [], "key written twice: name"),
        (MINIMAL, ["train.steps"], "must be section.name=value"),
        (MINIMAL, ["steps=3"], "must be section.name=value"),
        (MINIMAL, ["run.name.first=3"], "must be section.name=value"),
        ("run: 3\n", ["run.name=x"], "run must be a section of keys, got 3"),
        ("- a\n", [], "must hold sections"),
        ("run: {name: tiny}\n", [], "data: this key must be given"),
        (MINIMAL, ["train.global_batch_size=true"], "valid integer, got True"),
        (MINIMAL, ["train.global_batch_size='8'"], "valid integer, got '8'"),
        (MINIMAL, ["run.seed=null"], "valid integer, got None"),
        (MINIMAL, ["model.attention_resolution=64"], "one of [8, 16] at resolution 32, got 64"),
        (MINIMAL, ["train.accumulation_steps=3"], "divisible by accumulation_steps, got 8 and 3"),
        (MINIMAL, ["evaluation.intra_class_images=1"], "must be 0, for none, or at least 2"),
        (MINIMAL, ["ema.decay=1.0"], "ema.decay: input should be less than 1, got 1.0"),
        (MINIMAL, ["optimizer.lr_g=.inf"], "optimizer.lr_g"),
    ],
)
def test_what_cannot_be_used_says_why(tmp_path, text, overrides, expected):
    assert expected in mistakes(tmp_path, text, *overrides)


def test_a_missing_file_names_the_ones_there_are(tmp_path, monkeypatch, repo_root):
    monkeypatch.chdir(repo_root)
    with pytest.raises(ConfigError, match=r"imagenet129\.yaml does not exist.*configs/imagenet128\.yaml"):
        load_config(tmp_path / "imagenet129.yaml")


def test_resolved_yaml_reads_back_to_the_same_configuration(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["optimizer.lr_g=1e-7", "run.accept_changes=[optimizer.lr_d]"])
    again = load_config(write(tmp_path, to_yaml(config)))
    assert again == config


def test_a_resume_may_change_lengths_and_places_but_no_hyperparameter(tmp_path):
    path = write(tmp_path, MINIMAL)
    before = to_dict(load_config(path))
    free = ["train.steps=99", "data.num_workers=0", "run.dir=elsewhere", "train.log_every_steps=1"]
    assert changed_hyperparameters(before, load_config(path, free)) == []
    changed = load_config(path, ["optimizer.lr_g=0.5", "run.seed=1"])
    assert changed_hyperparameters(before, changed) == ["optimizer.lr_g: 0.0001 -> 0.5", "run.seed: 0 -> 1"]
    accepted = load_config(path, ["optimizer.lr_g=0.5", "run.accept_changes=[optimizer.lr_g]"])
    assert changed_hyperparameters(before, accepted) == []


def test_every_preset_is_valid_and_states_its_hyperparameters(repo_root):
    paths = sorted((repo_root / "configs").glob("*.yaml"))
    assert {path.stem for path in paths} >= {"imagenet128", "imagenet128_paper", "cifar10"}
    for path in paths:
        config = load_config(path)
        stated = flatten(yaml.safe_load(path.read_text()))
        assert {f"optimizer.{name}" for name in ("lr_g", "lr_d", "betas", "eps")} <= stated.keys(), path
        assert {"model.attention_resolution", "ema.decay", "ema.start_step", "train.num_d_steps"} <= stated.keys(), path
        assert config.run.name == path.stem


def test_the_imagenet_preset_is_the_schedule_of_the_best_published_result(repo_root):
    config = load_config(repo_root / "configs" / "imagenet128.yaml")
    assert (config.optimizer.lr_g, config.optimizer.lr_d, config.optimizer.betas) == (1e-4, 4e-4, (0.0, 0.999))
    assert (config.train.global_batch_size, config.train.num_d_steps, config.data.horizontal_flip) == (256, 1, False)
    assert (config.ema.decay, config.ema.start_step, config.model.attention_resolution) == (0.999, 2000, 64)
    assert (config.model.spectral_norm_eps, config.model.batch_norm_eps, config.model.init) == (1e-8, 1e-5, "xavier")


def test_a_key_that_is_younger_than_a_checkpoint_had_its_default_then(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    before = to_dict(config)
    del before["model"]["architecture"], before["optimizer"]["eps"]
    assert changed_hyperparameters(before, config) == []
    other = load_config(write(tmp_path, MINIMAL), ["optimizer.eps=1e-6"])
    assert changed_hyperparameters(before, other) == ["optimizer.eps: 1e-08 -> 1e-06"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.num_classes=10", "got 64, 10 and 32"),
        ("model.resolution=128", "got 128, 0 and 32"),
        ("model.attention_resolution=16", "got 64, 0 and 16"),
        ("model.spectral_norm_on_class_tables=true", "it has no classes"),
    ],
)
def test_the_dcgan_pair_is_of_one_size_and_unconditional(repo_root, override, said):
    with pytest.raises(ConfigError, match=said):
        load_config(repo_root / "configs/celeba64.yaml", [override])


def test_recipes_with_and_without_attention_differ_in_nothing_else(repo_root):
    one, other = (
        flatten(to_dict(load_config(repo_root / f"configs/{name}.yaml"))) for name in ("imagenet128", "sngan128")
    )
    assert {key for key in one if one[key] != other[key]} == {"run.name", "model.attention_resolution"}
