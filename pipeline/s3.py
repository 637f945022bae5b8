"""Objects of a store, read and written in ways that survive a bad network.

botocore repeats a request until the headers of the answer are there; a body that breaks off is the caller's affair. So
all retries of reads are made here, in one place: the next request asks for the missing bytes only (Range), of the same
version of the object (If-Match, and its ETag compared, as some stores ignore If-Match). A connection that closes in the
headers leaves some of them out or cut short, and neither http.client nor botocore says so: headers are believed once a
byte of the body has come.
"""

import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.read_counts import ReadCounts
from pipeline.s3_store import S3Location, changed, client, endpoint, error_code, final_error, parse

MAX_ATTEMPTS = 9  # in a row without a new byte: at most 46 s of pauses
MAX_SECONDS = 45  # without a new byte, then no further attempt: a job that cannot read its data ends within a minute
UPLOAD_ATTEMPTS = 3  # of a whole file
CHUNK_BYTES = 262_144  # of a body at once: what a broken connection may cost; smaller ones cost more CPU seconds
PAGE_NAMES = 1000  # of a list at once, the most that S3 gives

Result = TypeVar("Result")
_log = logging.getLogger(__name__)
_jitter = random.SystemRandom()  # has no state that forked processes could share


@dataclass(frozen=True)
class Found:
    """What a store says of an object."""

    size: int
    metadata: dict[str, str]  # keys in lower case
    etag: str  # the store's name for these bytes; "" where it has none


def read(location: str, name: str, start: int, stop: int | None, counts: ReadCounts) -> bytes:
    """Bytes [start, stop) of an object, or all from `start` on if `stop` is None.

    Raises:
        FileNotFoundError: No such bucket or object.
        PermissionError: No, wrong or expired credentials, or ones that do not allow this.
        OSError: The object is shorter, or was replaced while it was read; or MAX_ATTEMPTS brought not one byte more.
    """
    if start == stop:
        return b""
    reading = _Reading(parse(location), name, start, stop)
    _retried(reading.go_on, reading.where, name, counts, lambda: len(reading.data))
    return bytes(reading.data)


def find(location: str, name: str, counts: ReadCounts) -> Found | None:
    """Size and metadata of an object; None if there is none, an error if there is no bucket."""
    where = parse(location)

    def ask() -> Found | None:
        from botocore.exceptions import ClientError

        try:  # a GET of one byte: the answer to a HEAD has no body that could tell what is wrong
            answer = _get(where, name, Range="bytes=0-0")
        except ClientError as error:
            code = error_code(error)
            if code == "InvalidRange":  # there is no byte 0, so no sha256 is worth asking for either
                return Found(0, {}, "")
            if code in ("NoSuchKey", "404"):
                return None
            raise
        with answer["Body"] as body:
            _more_of(body, 1)
        metadata = {key.lower(): value for key, value in answer["Metadata"].items()}
        return Found(_place(answer, where.address(name)).total, metadata, answer.get("ETag", ""))

    return _retried(ask, where, name, counts)


def list_names(location: str, counts: ReadCounts) -> list[str]:
    """Names of the objects directly under the prefix, sorted."""
    where = parse(location)
    prefix = where.key("")
    names: list[str] = []
    request: dict[str, Any] = {"Bucket": where.bucket, "Prefix": prefix, "Delimiter": "/", "MaxKeys": PAGE_NAMES}
    while True:
        answer = _retried(lambda: _list(where, request), where, "", counts)
        names += [entry["Key"].removeprefix(prefix) for entry in answer.get("Contents", ())]
        if not answer["IsTruncated"]:
            return sorted(name for name in names if name)
        request["ContinuationToken"] = answer["NextContinuationToken"]


def upload(location: str, name: str, path: Path, sha256: str, advance: Callable[[int], None]) -> None:
    """Writes a file as an object that carries its sha256 as metadata; large ones in parts, several at a time.

    Args:
        location: Where to.
        name: Of the object.
        path: The file.
        sha256: Of its bytes, hexadecimal.
        advance: Is called with the bytes just sent, negative for a part that is sent again; in other threads.
    """
    from boto3.exceptions import S3UploadFailedError
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import BotoCoreError, ClientError

    where = parse(location)
    # The CRT client ignores endpoint_url and goes to AWS (boto/boto3#4839).
    transfer = TransferConfig(multipart_threshold=2**26, multipart_chunksize=2**24, max_concurrency=4)
    transfer.preferred_transfer_client = "classic"
    store = client(where, attempts=MAX_ATTEMPTS)  # which repeats each request
    for failures in range(1, UPLOAD_ATTEMPTS + 1):
        sent: list[int] = []

        def count(num_bytes: int, sent: list[int] = sent) -> None:
            sent.append(num_bytes)
            advance(num_bytes)

        try:
            store.upload_file(
                str(path), where.bucket, where.key(name), {"Metadata": {"sha256": sha256}}, count, transfer
            )
            return
        # Headers cut short are a KeyError or ValueError in botocore and s3transfer.
        except (S3UploadFailedError, BotoCoreError, ClientError, KeyError, ValueError) as error:
            wrapped = isinstance(error, S3UploadFailedError) and error.__context__ is not None
            cause = error.__context__ if wrapped else error
            assert cause is not None
            final = final_error(cause, where, name)
            if final or failures == UPLOAD_ATTEMPTS:
                raise final or OSError(f"{where.address(name)}: could not be written: {cause}") from error
            advance(-sum(sent))
            time.sleep(_pause_seconds(failures))


@dataclass(frozen=True)
class _Place:
    """Which bytes of the object an answer brings."""

    first: int
    total: int  # bytes of the whole object


class _Reading:
    """A read under way: what is there so far, and of which version of the object."""

    def __init__(self, where: S3Location, name: str, start: int, stop: int | None) -> None:
        self.where, self.data = where, bytearray()
        self._name, self._start, self._stop = name, start, stop
        self._etag: str | None = None

    def go_on(self, counts: ReadCounts) -> None:
        """Asks once for what is missing; keeps all that comes, however it ends."""
        from botocore.exceptions import ClientError

        where, address = self.where, self.where.address(self._name)
        position = self._start + len(self.data)
        wanted: dict[str, str] = {}
        if position or self._stop is not None:  # an empty object has no range to ask for
            wanted["Range"] = f"bytes={position}-" + (str(self._stop - 1) if self._stop is not None else "")
        if self._etag:
            wanted["IfMatch"] = self._etag
        try:
            answer = _get(where, self._name, **wanted)
        except ClientError as error:
            if error_code(error) != "InvalidRange":
                raise
            raise OSError(f"{address}: expected a byte {position}, the object ends before it") from error
        if answer["ContentLength"] == 0 and not wanted:
            return
        with answer["Body"] as body:
            chunk = _more_of(body, CHUNK_BYTES)
            skip = position - self._check(answer, position, address)
            assert self._stop is not None
            while True:
                counts.bytes_fetched += len(chunk)
                self.data += chunk[skip : skip + self._stop - self._start - len(self.data)]
                skip -= min(skip, len(chunk))
                if self._start + len(self.data) == self._stop:
                    return
                chunk = _more_of(body, CHUNK_BYTES)

    def _check(self, answer: Any, position: int, address: str) -> int:
        """Compares the headers of an answer with what was asked for; returns its first byte, at `position` or before.

        Some stores send the whole object whatever the range.
        """
        place, etag = _place(answer, address), answer.get("ETag")
        if self._etag not in (None, etag):
            raise changed(address)
        self._etag = etag
        self._stop = place.total if self._stop is None else self._stop
        if self._stop > place.total:
            raise OSError(
                f"{address}: expected {self._stop - self._start} bytes at [{self._start}, {self._stop}), "
                f"got {max(place.total - self._start, 0)}: the object ends at byte {place.total}"
            )
        if place.first > position:
            raise OSError(f"{address}: expected bytes from {position} on, the store sent bytes from {place.first}")
        return place.first


def _get(where: S3Location, name: str, **request: str) -> Any:
    store = client(where)
    try:
        answer = store.get_object(Bucket=where.bucket, Key=where.key(name), **request)
    except ValueError as error:
        raise ConnectionError(f"a header was cut short: {error}") from error
    if "ContentLength" not in answer:
        raise ConnectionError("the headers were cut short: there is no Content-Length")
    return answer


def _list(where: S3Location, request: dict[str, Any]) -> Any:
    answer = client(where).list_objects_v2(**request)
    if "IsTruncated" not in answer:
        raise ConnectionError("the answer was cut short")
    return answer


def _more_of(body: Any, num_bytes: int) -> bytes:
    """The next bytes of a body that has more to come."""
    chunk = body.read(num_bytes)
    if not chunk:
        raise ConnectionError("the body ended early")
    return bytes(chunk)


def _place(answer: Any, address: str) -> _Place:
    """Believes Content-Range, not the status: some stores send the right range with status 200."""
    text = answer.get("ContentRange")
    if text is None:
        return _Place(0, int(answer["ContentLength"]))
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", text)
    if not match:
        raise OSError(f"{address}: the store answered with Content-Range {text!r}, expected bytes FIRST-LAST/TOTAL")
    return _Place(int(match[1]), int(match[2]))


def _retried(
    attempt: Callable[..., Result],
    where: S3Location,
    name: str,
    counts: ReadCounts,
    progress: Callable[[], int] | None = None,
) -> Result:
    """Repeats an attempt while it fails for reasons that pass, until MAX_ATTEMPTS or MAX_SECONDS bring nothing."""
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    failures = done = 0
    begin = last_progress = time.monotonic()
    try:
        while True:
            counts.requests += 1
            try:
                return attempt(counts) if progress else attempt()
            except (BotoCoreError, ClientError, HTTPError, ConnectionError, TimeoutError) as error:
                final = final_error(error, where, name)
                if final:
                    raise final from error
                now = progress() if progress else 0
                if now > done:
                    failures, done, last_progress = 0, now, time.monotonic()
                else:
                    failures += 1
                seconds = time.monotonic() - last_progress
                if failures == MAX_ATTEMPTS or seconds > MAX_SECONDS:
                    raise OSError(
                        f"{where.address(name)}: {failures} attempts in {seconds:.0f} s brought nothing, "
                        f"the last: {error}; check that the store at {endpoint(where)} is up and reachable from here"
                    ) from error
                if failures >= 4:
                    _log.warning("%s: attempt %d of %d: %s", where.address(name), failures, MAX_ATTEMPTS, error)
                counts.retries += 1
                counts.resumed_reads += done > 0
                time.sleep(_pause_seconds(failures))
    finally:
        counts.fetch_seconds += time.monotonic() - begin


def _pause_seconds(failures: int) -> float:
    return _jitter.uniform(0.5, 1) * min(0.125 * 2.0**failures, 15.0)
