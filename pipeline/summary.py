"""What will be trained, checked and said before anything costly happens."""

from pipeline.config import Config, ConfigError
from pipeline.manifest import ShardSet
from pipeline.networks import count_parameters


def check_data(config: Config, shard_set: ShardSet, world_size: int) -> None:
    """Checks the data set and the batch arithmetic against the configuration.

    Raises:
        ConfigError: with every disagreement, its keys, values and the way out.
    """
    manifest, model, train = shard_set.manifest, config.model, config.train
    faults = []
    if manifest.num_classes != model.num_classes:
        faults.append(
            f"model.num_classes is {model.num_classes}, but data.shards={config.data.shards} has "
            f"{manifest.num_classes} classes; set model.num_classes={manifest.num_classes} if that is the set you mean"
        )
    if manifest.image_size not in (None, model.resolution):
        faults.append(
            f"model.resolution is {model.resolution}, but data.shards={config.data.shards} holds images of "
            f"{manifest.image_size} px; build shards with --size {model.resolution}"
        )
    if manifest.num_samples < train.global_batch_size:
        faults.append(
            f"train.global_batch_size is {train.global_batch_size}, but data.shards={config.data.shards} holds "
            f"{manifest.num_samples} images; use a smaller batch"
        )
    if config.micro_batch_size % world_size:
        near = [size for size in range(1, config.micro_batch_size + 1) if config.micro_batch_size % size == 0]
        faults.append(
            f"train.global_batch_size / accumulation_steps = {train.global_batch_size} / {train.accumulation_steps} = "
            f"{config.micro_batch_size} images cannot be dealt to {world_size} processes; use a multiple of "
            f"{world_size}, or one of {near} processes"
        )
    if faults:
        raise ConfigError("\n".join(faults))


def steps_per_epoch(config: Config, shard_set: ShardSet) -> float:
    """Returns generator updates per pass over the data set."""
    batches = shard_set.manifest.num_samples // config.train.global_batch_size
    return batches / config.train.num_d_steps


def describe(config: Config, shard_set: ShardSet, world_size: int, device: str) -> str:
    """Returns a few lines: data, classes and their balance, batch arithmetic, networks, where the run lives."""
    manifest, model, train = shard_set.manifest, config.model, config.train
    epoch = steps_per_epoch(config, shard_set)
    per_rank = config.micro_batch_size // world_size
    g_parameters, d_parameters = count_parameters(config)
    attention = f"attention at {model.attention_resolution} px" if model.attention_resolution else "no attention"
    norm = "synchronised" if model.sync_batch_norm else "per-process (results depend on the number of processes)"
    size = f"{manifest.image_size} px" if manifest.image_size else "original sizes"
    lines = [
        ("run", f"{config.run.name}, seed {config.run.seed}, in {config.run_dir}"),
        (
            "data",
            f"{manifest.name} {manifest.split}, {manifest.num_samples:,} images, {size}, {manifest.encoding}, "
            f"id {shard_set.dataset_id[:12]}{'' if manifest.complete else ', not the complete set'}",
        ),
        ("classes", _balance(manifest.class_counts)),
        (
            "batch",
            f"{train.global_batch_size} images = {train.accumulation_steps} micro-batch(es) x {world_size} process(es) "
            f"x {per_rank}; {train.num_d_steps} discriminator step(s) per update",
        ),
        ("length", f"{train.steps:,} steps, {epoch:,.1f} to the epoch, {train.steps / epoch:,.1f} epochs"),
        (
            "model",
            f"{model.resolution} px, generator {g_parameters:,} and discriminator {d_parameters:,} parameters, "
            f"{attention}, {norm} batch norm, EMA {config.ema.decay} from step {config.ema.start_step:,}",
        ),
        ("device", f"{world_size} x {device}, {train.precision}"),
    ]
    return "\n".join(f"{name:<8} {text}" for name, text in lines)


def _balance(counts: tuple[int, ...]) -> str:
    if not counts:
        return "none (unconditional)"
    ordered = sorted(counts)
    return f"{len(counts):,}, {ordered[0]:,} to {ordered[-1]:,} images each, median {ordered[len(ordered) // 2]:,}"
