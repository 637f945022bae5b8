"""What reading a shard set cost, counted where it is read and added up over batches and processes."""

import dataclasses
from dataclasses import dataclass


@dataclass
class ReadCounts:
    """Counters; the sum of two counts both, the difference counts what came since."""

    bytes_read: int = 0
    """From files, those for verifying included."""
    bytes_fetched: int = 0
    """From object storage."""
    requests: int = 0
    """To object storage."""
    retries: int = 0
    """Requests that repeat a failed one."""
    resumed_reads: int = 0
    """Retries that went on in the middle of an object."""
    fetch_seconds: float = 0.0
    """In requests and in the pauses before retries; of several processes, added up."""
    blocks_verified: int = 0
    blocks_fetched: int = 0
    """From object storage into the block cache."""
    cache_hits: int = 0
    """Uses of a block that the block cache held; a block serves several batches, and each is a use."""
    cache_misses: int = 0
    """Uses of a block that had to wait until it was fetched."""
    bad_blocks: int = 0
    """Blocks thrown away, from the cache or as they came, because their bytes were wrong."""

    def __add__(self, other: "ReadCounts") -> "ReadCounts":
        names = [field.name for field in dataclasses.fields(self)]
        return ReadCounts(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def __sub__(self, other: "ReadCounts") -> "ReadCounts":
        return self + ReadCounts(**{name: -value for name, value in dataclasses.asdict(other).items()})
