"""Shards built straight into object storage: each is made in a scratch directory, sent, and removed there.

So at most one shard per worker lies on local disk, and those that a killed build had not sent yet: the same command
sends them.
"""

import hashlib
import tempfile
from pathlib import Path

from pipeline.build_files import find_record, write
from pipeline.manifest import Manifest
from pipeline.send import File, send
from pipeline.shard_file import ShardRecord, ShardTask, build_shard, record_name
from pipeline.workers import Advance


def scratch_directory(planned: Manifest, location: str, parent: Path | None) -> Path:
    """The scratch directory of one build, in `parent` or that for temporary files: the same for the same command."""
    name = hashlib.sha256(location.encode() + b"\0" + planned.to_bytes()).hexdigest()[:16]
    return (parent or Path(tempfile.gettempdir())) / f"shards-{name}"


def build_and_send(task: ShardTask, advance: Advance) -> tuple[ShardRecord, bool]:
    """Builds one shard and sends it and its record, or keeps what is in object storage.

    Returns:
        Its record, and whether it was kept, there or in the scratch directory.
    """
    record, was_kept = find_record(task.location, task.name), True
    if record is None:
        record, was_kept = build_shard(task, advance)
        shard = record.shard
        send(File(shard.name, shard.bytes, shard.sha256), task.directory, task.location, lambda num_bytes: None)
        write(task.location, record_name(task.name), record.to_bytes())
    else:
        advance(len(task.source))
    for path in task.directory.glob(f"{Path(task.name).stem}.*"):
        path.unlink(missing_ok=True)
    return record, was_kept
