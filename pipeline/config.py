"""The configuration: frozen dataclasses with units and checks, read from YAML plus `section.name=value` overrides."""

import difflib
import json
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every mistake with its key and value."""


PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]
UnitInterval = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class RunConfig:
    """Who this run is, where it lives, and what makes it repeatable."""

    name: Annotated[str, Field(pattern=r"^[^/]+$")]  # the run directory is DIR/NAME
    dir: str = "runs"  # must be a directory that every node sees
    seed: NonNegativeInt = 0  # noise, labels, order, flips and initial weights are functions of it
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    deterministic: bool = False  # bitwise repeatable on CUDA too, at some cost; CPU always is
    expected_world_size: PositiveInt | None = None  # an error, not a surprise, when another number of processes starts
    # What a resume may change: hyperparameters, such as [optimizer.lr_g]; data.shards; backend (between DDP and ZeRO).
    accept_changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are and how they are read."""

    shards: str  # directory with manifest.json, or s3://bucket/prefix, which may name its store (see s3_store.py)
    horizontal_flip: bool = False  # mirrors half of the images, another half each epoch
    num_workers: NonNegativeInt = 2  # decoding processes per rank; 0 decodes in the training process
    prefetch_batches: PositiveInt = 4  # batches each worker prepares ahead
    cache_dir: str | None = None  # local disk for blocks of a remote set; null: sagan-blocks-UID where TMPDIR says
    cache_bytes: PositiveInt = 50_000_000_000  # of it, for all processes of a node together


@dataclass(frozen=True)
class ModelConfig:
    """The networks; the docstrings of `sagan` give the sources."""

    resolution: Literal[16, 32, 64, 128, 256]  # pixels
    num_classes: NonNegativeInt  # 0: unconditional; must equal the data set's
    architecture: Literal["resnet", "dcgan"] = "resnet"  # SAGAN's; dcgan: 64 px, unconditional (configs/celeba64.yaml)
    z_dim: PositiveInt = 128
    g_channels: PositiveInt = 64  # width of the generator's last block; the others are multiples of it
    d_channels: PositiveInt = 64
    attention_resolution: int | None = 64  # feature map with self-attention, pixels; null: none (SNGAN)
    init: Literal["xavier", "orthogonal"] = "xavier"
    spectral_norm_eps: PositiveFinite = 1e-8
    batch_norm_eps: PositiveFinite = 1e-5
    batch_norm_momentum: Annotated[float, Field(gt=0, le=1)] = 0.1  # weight of the newest batch in running statistics
    sync_batch_norm: bool = True  # false makes the result depend on the number of processes; the run is tagged so
    spectral_norm_on_class_tables: bool = False  # an ablation: it cost published reproductions their FID

    def __post_init__(self) -> None:
        allowed = [size for size in (8, 16, 32, 64, 128) if size < self.resolution]
        if self.attention_resolution is not None and self.attention_resolution not in allowed:
            raise ValueError(
                f"attention_resolution must be null or one of {allowed} at resolution {self.resolution}, "
                f"got {self.attention_resolution}"
            )
        if self.architecture == "dcgan" and (
            (self.resolution, self.num_classes) != (64, 0) or self.attention_resolution not in (None, 32)
        ):
            raise ValueError(
                "architecture dcgan has resolution 64, num_classes 0 and attention_resolution 32 or null, "
                f"got {self.resolution}, {self.num_classes} and {self.attention_resolution}"
            )
        if self.architecture == "dcgan" and self.spectral_norm_on_class_tables:
            raise ValueError("spectral_norm_on_class_tables must be false for architecture dcgan: it has no classes")


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam for both networks, each with its own learning rate (TTUR, arXiv 1706.08500)."""

    lr_g: PositiveFinite = 1e-4
    lr_d: PositiveFinite = 4e-4
    betas: tuple[UnitInterval, UnitInterval] = (0.0, 0.999)
    eps: PositiveFinite = 1e-8


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what portions and at which precision."""

    steps: PositiveInt  # generator updates
    global_batch_size: PositiveInt  # images of one update, over all processes and accumulation steps
    accumulation_steps: PositiveInt = 1  # micro-batches of one update; part of the result, whatever the world size
    num_d_steps: PositiveInt = 1  # discriminator updates per generator update
    # bf16: autocast with float32 islands. float32 on a GPU with TF32: convolutions use it, as PyTorch does by default.
    precision: Literal["float32", "bf16", "float64"] = "float32"
    channels_last: bool = True
    compile: bool = False  # torch.compile: the first step takes minutes, the others less
    log_every_steps: PositiveInt = 50
    sample_every_steps: PositiveInt = 1000
    checkpoint_every_steps: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 3

    def __post_init__(self) -> None:
        if self.global_batch_size % self.accumulation_steps:
            raise ValueError(
                f"global_batch_size must be divisible by accumulation_steps, "
                f"got {self.global_batch_size} and {self.accumulation_steps}"
            )


@dataclass(frozen=True)
class EmaConfig:
    """The exponential moving average of the generator, which is what is sampled and evaluated."""

    decay: UnitInterval = 0.999
    start_step: NonNegativeInt = 2000  # until then the average is a copy


Metric = Literal["inception_score", "fid", "kid", "precision_recall"]


@dataclass(frozen=True)
class EvaluationConfig:
    """How `launch/evaluate.py` scores a run; training only leaves the snapshots. docs/evaluation.md explains all."""

    every_steps: PositiveInt | None = 10_000  # snapshots for the evaluation, and one at the end; null: none
    num_images: Annotated[int, Field(ge=10)] = 50_000  # samples; scores of another number have another name
    batch_size: PositiveInt = 64  # samples of one block; equal for every world size, so part of the protocol
    seed: NonNegativeInt = 0  # noise and labels of the samples are functions of it
    weights: Literal["ema", "raw"] = "ema"  # of the generator: the average, or the trained weights themselves
    # running: statistics of training; standing: of standing_batches fresh batches; batch: of each block of samples.
    batch_norm: Literal["running", "standing", "batch"] = "running"
    standing_batches: PositiveInt = 16  # of batch_size samples each
    labels: Literal["uniform", "balanced"] = "uniform"  # drawn at random; or sample i is of class i mod num_classes
    metrics: tuple[Metric, ...] = ("inception_score", "fid", "kid", "precision_recall")
    kid_subset_size: Annotated[int, Field(ge=2)] = 1000  # images of each of 100 subsets
    truncations: tuple[PositiveFinite, ...] = ()  # thresholds of |z|: a curve of FID against Inception Score
    intra_class_images: NonNegativeInt = 0  # samples of each class for intra-class FID; 5000 is usual; 0: none
    features: str = "inception"  # or random (smoke runs), FILE.pt (TorchScript), package.module:function
    inception_weights: str | None = None  # file; null: the one in the torch hub cache, downloaded when missing
    allow_unofficial_weights: bool = False  # other weights than the published ones; the scores are named so
    reference_dir: str | None = None  # where statistics of the training set are kept; null: SHARDS/reference
    reference_file: str | None = None  # statistics that others made (npz with mu and sigma), for one more FID
    validation_shards: str | None = None  # the validation split, for one more FID and for --real

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("metrics must name at least one of inception_score, fid, kid, precision_recall, got []")
        if self.intra_class_images == 1:
            raise ValueError("intra_class_images must be 0, for none, or at least 2: a covariance needs two, got 1")
        own = self.features.endswith(".pt") or ":" in self.features
        if self.features not in ("inception", "random") and not own:
            raise ValueError(
                "features must be inception, random, a TorchScript FILE.pt, or package.module:function, "
                f"got {self.features!r}"
            )


@dataclass(frozen=True)
class TrackingConfig:
    """Where the run's numbers and pictures go, after RUN/journal.jsonl."""

    enabled: bool = True  # false: the journal alone; a later start or evaluation with true sends all of it
    uri: str | None = None  # MLflow server or database; null: MLFLOW_TRACKING_URI, else run.dir/mlflow.db
    experiment: Annotated[str, Field(min_length=1)] = "sagan"
    artifact_location: str | None = None  # of a new experiment: s3://BUCKET/PREFIX; null: run.dir, or the server's

    def __post_init__(self) -> None:
        if self.uri is not None and self.uri != "databricks" and "://" not in self.uri:
            raise ValueError(
                f"uri must be an address such as http://HOST:5000, sqlite:///FILE or postgresql://..., got {self.uri!r}"
            )


@dataclass(frozen=True)
class HealthConfig:
    """What happens when training goes wrong."""

    on_failure: Literal["rollback", "stop"] = "rollback"  # of numbers: NaN or infinity in a loss, gradient or buffer
    max_rollbacks: NonNegativeInt = 3  # a run that goes non-finite more often than this stops
    stall_seconds: PositiveFinite = 1800.0  # without a step for so long, every rank prints its stack and the job ends


@dataclass(frozen=True)
class Config:
    """All of a run's configuration."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    health: HealthConfig = field(default_factory=HealthConfig)

    @property
    def run_dir(self) -> Path:
        """Directory of this run."""
        return Path(self.run.dir) / self.run.name

    @property
    def micro_batch_size(self) -> int:
        """Images of one micro-batch, over all processes."""
        return self.train.global_batch_size // self.train.accumulation_steps


# What a resumed run may change without being asked: none of it alters the mathematics of an update.
FREE_TO_CHANGE = frozenset(
    {
        "run.name", "run.dir", "run.device", "run.deterministic", "run.expected_world_size", "run.accept_changes",
        "data.shards", "data.num_workers", "data.prefetch_batches", "data.cache_dir", "data.cache_bytes",
        "train.steps", "train.log_every_steps", "train.sample_every_steps", "train.checkpoint_every_steps",
        "train.keep_checkpoints", "train.channels_last", "train.compile",
        "health.on_failure", "health.max_rollbacks", "health.stall_seconds",
    }
)  # fmt: skip


def load_config(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file and applies overrides.

    Args:
        path: YAML file with the sections of `Config`.
        overrides: `section.name=value`, the value in YAML syntax; later ones win.

    Raises:
        ConfigError: with every mistake found (unknown keys with the nearest right one, wrong types, values out of
            range, keys written twice), each with its dotted key and value.
    """
    try:
        values = yaml.load(Path(path).read_text(), _Loader) or {}
    except FileNotFoundError:
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml")))
        raise ConfigError(f"config file {path} does not exist; the ones here are: {known or 'none'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections (run:, data:, ...), got {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return config_from_dict(values, str(path))


def config_from_dict(values: dict[str, Any], origin: str) -> Config:
    """Returns the checked configuration; `origin` names where the values came from in the error."""
    try:
        document = json.dumps(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: a value is no plain YAML scalar, list or mapping: {error}") from None
    try:
        return TypeAdapter(Config).validate_json(document, strict=True, extra="forbid")
    except ValidationError as error:
        mistakes = [_describe(item) for item in error.errors()]
        lines = "\n".join(f"  {mistake}" for mistake in mistakes)
        raise ConfigError(f"{origin}: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}\n{lines}") from None


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested plain values, equal to what JSON and YAML give back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def to_yaml(config: Config) -> str:
    """Returns the resolved configuration as YAML that `load_config` reads back."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, default_flow_style=None)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"section.name": value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changed_hyperparameters(before: dict[str, Any], config: Config) -> list[str]:
    """Lists what a resume would change and may not: one line per key, `key: old -> new`.

    A key that is younger than the checkpoint had its default value then, as that is what the code before it did.

    Args:
        before: nested values of the configuration the checkpoint was made with.
        config: configuration of the run that resumes; `run.accept_changes` excuses keys.
    """
    old, new = _defaults() | flatten(before), flatten(to_dict(config))
    excused = FREE_TO_CHANGE | set(config.run.accept_changes)
    missing = "(absent)"
    return [
        f"{key}: {old.get(key, missing)} -> {new.get(key, missing)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
        and key not in excused
        and key.split(".")[0] not in ("tracking", "evaluation")
    ]


def _defaults() -> dict[str, Any]:
    sections: dict[str, Any] = get_type_hints(Config)
    found = {name: {item.name: item.default for item in fields(kind)} for name, kind in sections.items()}
    return {key: value for key, value in flatten(found).items() if value is not MISSING}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a float (YAML 1.2) and refuses a key written twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        if repeated := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(
                None, None, f"key written twice: {', '.join(repeated)}; keep one of them", node.start_mark
            )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `_Loader` would read as a float."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    section, dot, name = dotted.partition(".")
    if not (equals and dot and section and name) or "." in name:
        raise ConfigError(f"override {override!r} must be section.name=value, such as train.steps=1000")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    if section == "run" and name == "name":
        value = text.strip("'\"")  # a name, though 2025, 2025-01-31 or no are other things in YAML
    node = values.setdefault(section, {})
    if not isinstance(node, dict):
        raise ConfigError(f"override {override!r}: {section} must be a section of keys, got {node!r} in the file")
    node[name] = value


def _describe(item: Any) -> str:
    loc = [str(part) for part in item["loc"]]
    key = ".".join(loc)
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: unknown key{_nearest(loc)}"
    if item["type"] in ("missing", "missing_argument"):
        return f"{key}: this key must be given"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{key}.{message}"
    return f"{key}: {message[0].lower()}{message[1:]}, got {item['input']!r}"


def _nearest(loc: list[str]) -> str:
    """Returns `; did you mean ...?` for the unknown key at `loc`, looking in its section first, then everywhere."""
    sections: dict[str, Any] = get_type_hints(Config)
    names = {section: [item.name for item in fields(kind)] for section, kind in sections.items() if is_dataclass(kind)}
    if len(loc) == 1:
        homes = [f"{section}.{loc[0]}" for section, keys in names.items() if loc[0] in keys]
        close = homes or difflib.get_close_matches(loc[0], names, n=1)
        return f"; did you mean {close[0]}?" if close else f"; the sections are {', '.join(names)}"
    section, name = loc[0], loc[1]
    elsewhere = [f"{other}.{name}" for other, keys in names.items() if name in keys]
    near = elsewhere or [f"{section}.{key}" for key in difflib.get_close_matches(name, names.get(section, []), n=1)]
    return f"; did you mean {near[0]}?" if near else f"; {section} has {', '.join(names.get(section, []))}"
