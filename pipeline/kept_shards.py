"""What indexing has read so far, a file for each shard, so that an interrupted run goes on where it was."""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pydantic

from pipeline import object_store
from pipeline.foreign_shard import ForeignShard, Found
from pipeline.shard_file import write_file

_FOUND = pydantic.TypeAdapter(Found)


class KeptShards:
    """Keeps what was found in shards until their set is made: beside it, or on this machine if it is in a bucket.

    Args:
        output: location of the set.
    """

    def __init__(self, output: str):
        if object_store.is_remote(output):
            name = hashlib.sha256(output.encode()).hexdigest()[:16]
            self._directory = Path.home() / ".cache" / "sagan-at-scale" / "indexing" / name
        else:
            self._directory = Path(output, ".indexing")

    def find(self, shard: ForeignShard) -> Found | None:
        """What an earlier run found in a shard; None if it did not read it, read it otherwise, or it was changed."""
        try:
            return _FOUND.validate_json(self._path(shard).read_bytes())
        except (FileNotFoundError, pydantic.ValidationError):
            return None

    def keep(self, shard: ForeignShard, found: Found) -> None:
        """Writes what was found in a shard."""
        self._directory.mkdir(parents=True, exist_ok=True)
        write_file(self._path(shard), _FOUND.dump_json(found))

    def remove(self) -> None:
        """Removes all, once the set is made."""
        shutil.rmtree(self._directory, ignore_errors=True)  # what stays is found by no other set

    def _path(self, shard: ForeignShard) -> Path:
        return self._directory / f"{hashlib.sha256(json.dumps(asdict(shard)).encode()).hexdigest()}.json"
