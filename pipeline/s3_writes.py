"""Small objects of a store, written whole from memory and removed; `pipeline.s3.upload` sends files."""

import hashlib
from collections.abc import Callable
from typing import Any

from pipeline.read_counts import ReadCounts
from pipeline.s3 import MAX_ATTEMPTS, UPLOAD_ATTEMPTS, find
from pipeline.s3_store import S3Location, client, error_code, final_error, parse

_THERE_ALREADY = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")


def put(location: str, name: str, data: bytes) -> None:
    """Writes an object that carries its sha256 as metadata; one that is there is replaced.

    Raises:
        OSError: The store does not take it, or does not hold it afterwards.
    """
    where, sha256 = parse(location), hashlib.sha256(data).hexdigest()
    request = {"Bucket": where.bucket, "Key": where.key(name), "Body": data, "Metadata": {"sha256": sha256}}
    _asked(lambda store: store.put_object(**request), where, name)
    found = find(location, name, ReadCounts())
    if found is None or (found.size, found.metadata.get("sha256")) != (len(data), sha256):
        raise OSError(f"{where.address(name)}: was written, but is not there; write it again")


def create(location: str, name: str, data: bytes) -> None:
    """Writes an object unless there is one of this name: of several that do so at once, one wins.

    Some stores ignore the condition, and there the last one wins: read what is there.
    """
    from botocore.exceptions import ClientError

    where = parse(location)

    def ask(store: Any) -> None:
        try:
            store.put_object(Bucket=where.bucket, Key=where.key(name), Body=data, IfNoneMatch="*")
        except ClientError as error:
            if error_code(error) not in _THERE_ALREADY:
                raise

    _asked(ask, where, name)


def remove(location: str, name: str) -> None:
    """Removes an object; one that is not there is no error."""
    where = parse(location)
    _asked(lambda store: store.delete_object(Bucket=where.bucket, Key=where.key(name)), where, name)


def _asked(ask: Callable[[Any], object], where: S3Location, name: str) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    store = client(where, attempts=MAX_ATTEMPTS)  # which repeats each request
    for failures in range(1, UPLOAD_ATTEMPTS + 1):
        try:
            ask(store)
            return
        # Headers cut short are a KeyError or ValueError in botocore.
        except (BotoCoreError, ClientError, KeyError, ValueError) as error:
            final = final_error(error, where, name)
            if final or failures == UPLOAD_ATTEMPTS:
                raise final or OSError(f"{where.address(name)}: could not be written: {error}") from error
