"""What is kept of a run so that it can be made again: configuration, packages, the manifest of its data."""

import importlib.metadata
import json
import platform
import sys
from pathlib import Path

from pipeline.config import Config, to_yaml
from pipeline.manifest import ShardSet
from pipeline.shard_file import write_file


def write(config: Config, shard_set: ShardSet) -> list[Path]:
    """Writes config.yaml, environment.txt and dataset_manifest.json into the run's directory; returns their paths."""
    contents = {
        "config.yaml": to_yaml(config).encode(),
        "environment.txt": describe_environment().encode(),
        "dataset_manifest.json": shard_set.manifest.to_bytes(),
    }
    config.run_dir.mkdir(parents=True, exist_ok=True)
    paths = [config.run_dir / name for name in contents]
    for path in paths:
        write_file(path, contents[path.name])  # whole at any time: an evaluation may be reading them
    return paths


def describe_environment() -> str:
    """Returns Python, system and every installed package, as `pip freeze` lists them."""
    packages = {f"{found.name}=={found.version}" for found in importlib.metadata.distributions()}
    head = [f"# Python {sys.version.split()[0]}, {platform.platform()}"]
    return "\n".join(head + sorted(packages, key=str.lower)) + "\n"


def describe_dataset(shard_set: ShardSet) -> dict[str, str]:
    """Returns a set as MLflow describes inputs: name, digest, where it is, and a profile as JSON."""
    manifest = shard_set.manifest
    profile = {
        "num_images": manifest.num_samples,
        "num_classes": manifest.num_classes,
        "image_size": manifest.image_size,
        "split": manifest.split,
        "complete": manifest.complete,
        "encoding": manifest.encoding,
    }
    return {
        "name": manifest.name,
        "digest": shard_set.dataset_id[:32],  # MLflow's limit is 36
        "source_type": "s3" if shard_set.location.startswith("s3://") else "local",
        "source": json.dumps({"uri": shard_set.location}),
        "profile": json.dumps(profile),
        "context": "training",
    }
