"""Reads from a real Ceph RGW, straight and through a proxy that breaks connections."""

import logging
import multiprocessing
import random
import socket
import threading
import time

import pytest

from pipeline import object_store, s3, s3_store
from pipeline.read_counts import ReadCounts

DATA = random.Random(0).randbytes(3_000_000)


@pytest.fixture
def store(s3_bucket):
    """Location that holds an object x.bin with the bytes DATA, an empty one, and one deeper down."""
    location = s3_bucket()
    put(location, "x.bin", DATA)
    put(location, "empty", b"")
    put(location, "deeper/y.bin", b"y")
    return location


@pytest.fixture
def quick(monkeypatch):
    """Pauses and time-outs that suit a server on the loopback."""
    monkeypatch.setattr(s3, "_pause_seconds", lambda failures: 0.01)
    monkeypatch.setattr(s3_store, "READ_TIMEOUT_SECONDS", 0.5)


def put(location, name, data):
    where = s3_store.parse(location)
    s3_store.client(where).put_object(Bucket=where.bucket, Key=where.key(name), Body=data)


def answer(status, body, *headers):
    """An HTTP answer for the proxy to send."""
    head = "\r\n".join([f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "Connection: close"])
    return ("answer", f"{head}\r\n\r\n".encode() + body)


# --- what a location says, which needs no store


def test_a_location_names_bucket_prefix_and_store():
    where = s3_store.parse(
        "s3://b/a/set/?endpoint_url=https://h:1&region=r&profile=p&addressing_style=path&anonymous=true"
    )
    assert (where.bucket, where.prefix, where.key("x"), where.address("x")) == (
        "b",
        "a/set",
        "a/set/x",
        "s3://b/a/set/x",
    )
    assert where.store == s3_store.Store("https://h:1", "r", "p", "path", True)
    assert s3_store.parse("s3://b").key("x") == "x"
    assert object_store.join("s3://b/set?region=r", "x") == "s3://b/set/x"


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("s3:///set", "expected s3://bucket/prefix, got no bucket"),
        ("s3://b/set?regoin=x", "unknown key regoin after `.`; did you mean region"),
        ("s3://b/set?a_key=x", "unknown key a_key after `.`; the keys are endpoint_url, region, profile"),
        ("s3://b/set?anonymous=yes", "anonymous must be true or false, got 'yes'"),
        ("s3://b/set?addressing_style=auto", "addressing_style must be path or virtual"),
        ("s3://b/set?region=", "region must be a text, got ''"),
        ("s3://b/set?endpoint_url=localhost:9000", "endpoint_url must begin with http"),
    ],
)
def test_a_wrong_location_is_refused(location, message):
    with pytest.raises(object_store.LocationError, match=message):
        object_store.read_bytes(location, "manifest.json")


@pytest.mark.parametrize(
    ("query", "url"),
    [
        ("", "https://bucket.s3.eu-west-1.amazonaws.com/k"),
        ("&addressing_style=path", "https://s3.eu-west-1.amazonaws.com/bucket/k"),
        ("&endpoint_url=http://h:1", "http://h:1/bucket/k"),
        ("&endpoint_url=http://h:1&addressing_style=virtual", "http://bucket.h:1/k"),
    ],
)
def test_the_address_of_an_object(query, url):
    class Sent(Exception):
        pass

    def catch(request, **_):
        raise Sent(request.url)

    client = s3_store.client(s3_store.parse(f"s3://bucket/?region=eu-west-1&anonymous=true{query}"))
    client.meta.events.register("before-send.s3", catch)
    with pytest.raises(Sent) as sent:
        client.get_object(Bucket="bucket", Key="k")
    assert str(sent.value) == url


def test_the_aws_variables_name_the_store(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://elsewhere:1")
    s3_store.client_of.cache_clear()
    client = s3_store.client(s3_store.parse("s3://b/set"))
    s3_store.client_of.cache_clear()
    assert client.meta.endpoint_url == "http://elsewhere:1"
    assert client.meta.config.request_checksum_calculation == "when_required"


# --- against the real store


@pytest.mark.s3
def test_reads_are_those_of_a_local_directory(store, tmp_path):
    (tmp_path / "x.bin").write_bytes(DATA)
    (tmp_path / "empty").write_bytes(b"")
    for location in (store, str(tmp_path)):
        assert object_store.list_names(location) == ["empty", "x.bin"]
        assert object_store.read_bytes(location, "x.bin") == DATA
        assert object_store.read_bytes(location, "empty") == b""
        assert object_store.read_range(location, "x.bin", 17, 2_000_003) == DATA[17:2_000_003]
        assert object_store.read_ranges(location, "x.bin", [(5, 6), (0, 0)]) == [DATA[5:6], b""]
        assert (object_store.size(location, "x.bin"), object_store.size(location, "empty")) == (3_000_000, 0)
        assert object_store.exists(location, "x.bin") and object_store.exists(location, "empty")
        assert not object_store.exists(location, "z")
        with pytest.raises(OSError, match=r"x\.bin: expected 2 bytes at \[2999999, 3000001\), got 1: the .* at byte"):
            object_store.read_range(location, "x.bin", 2_999_999, 3_000_001)
        with pytest.raises(FileNotFoundError, match="z: not found; check"):
            object_store.read_bytes(location, "z")
        with pytest.raises(FileNotFoundError, match="z: not found; check"):
            object_store.size(location, "z")


@pytest.mark.s3
def test_a_list_of_several_pages_is_whole(store, monkeypatch):
    monkeypatch.setattr(s3, "PAGE_NAMES", 1)
    assert object_store.list_names(store) == ["empty", "x.bin"]


@pytest.mark.s3
def test_a_read_costs_one_request_and_its_bytes(store):
    counts = ReadCounts()
    object_store.read_range(store, "x.bin", 1000, 2_500_000, counts)
    assert (counts.requests, counts.bytes_fetched, counts.retries) == (1, 2_499_000, 0)
    assert counts.fetch_seconds > 0


@pytest.mark.s3
def test_wrong_buckets_and_credentials_fail_at_once(store, monkeypatch):
    def failure(location):
        s3_store.client_of.cache_clear()
        begin = time.monotonic()
        with pytest.raises(OSError) as caught:
            object_store.exists(location, "manifest.json")
        assert time.monotonic() - begin < 5  # with MAX_ATTEMPTS it would be ten times that
        assert "\n" not in str(caught.value)
        return type(caught.value), str(caught.value)

    kind, message = failure(store.replace("s3://b", "s3://no-b"))
    assert kind is FileNotFoundError and "there is no bucket no-b" in message and "127.0.0.1" in message
    kind, message = failure(store + "&anonymous=true")
    assert kind is PermissionError and "does not allow this to requests without credentials" in message
    kind, message = failure(store + "&profile=nobody")
    assert kind is PermissionError and "profile (nobody) could not be found" in message
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    kind, message = failure(store)
    assert kind is PermissionError and "the secret key is wrong; check AWS_SECRET_ACCESS_KEY" in message
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    kind, message = failure(store)
    assert kind is PermissionError and "does not know the access key; check AWS_ACCESS_KEY_ID" in message
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    kind, message = failure(store)
    assert kind is PermissionError and "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message


def test_a_store_that_refuses_connections_is_asked_again(quick, monkeypatch):
    """It may be starting anew."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    with socket.socket() as nobody:  # bound, not listening
        nobody.bind(("127.0.0.1", 0))
        location = f"s3://bucket/set?endpoint_url=http://127.0.0.1:{nobody.getsockname()[1]}&region=any"
        with pytest.raises(
            OSError, match=r"9 attempts in \d+ s brought nothing.*Could not connect.*is up and reachable"
        ):
            object_store.read_range(location, "x.bin", 0, 10)


@pytest.mark.s3
def test_expired_credentials_fail_at_once(store, fault_proxy):
    """AWS says so with status 400; Ceph knows no such credentials without its token service."""
    through, proxy = fault_proxy(store, iter([(400, "ExpiredToken")]))
    with pytest.raises(PermissionError, match="the credentials have expired; get new ones"):
        object_store.read_bytes(through, "x.bin")
    assert proxy.faults == len(proxy.requests) == 1


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["reset", "close", "stall"])
def test_a_broken_read_goes_on_at_the_byte(store, fault_proxy, quick, fault):
    through, proxy = fault_proxy(store, iter([(fault, 1_000_000), (fault, 700_000)]))
    counts = ReadCounts()
    assert object_store.read_range(through, "x.bin", 10, 2_900_000, counts) == DATA[10:2_900_000]
    firsts = [int(wanted.removeprefix("bytes=").split("-")[0]) for _, wanted in proxy.requests]
    assert firsts == sorted(firsts) and firsts[0] == 10
    more = counts.retries - 2  # a machine that is busy elsewhere for a second is a stall as well
    assert counts.requests == 3 + more and (more == 0 or (fault == "stall" and more > 0))
    if fault != "reset":  # a reset throws away what lies in the buffers of the connection
        assert 2 <= counts.resumed_reads <= 2 + more and 3 <= len(set(firsts)) <= 3 + more
        assert 1_000_000 - s3.CHUNK_BYTES - 1000 < firsts[1] <= 1_000_000
    assert counts.bytes_fetched == 2_899_990  # what had come did not come again


@pytest.mark.s3
def test_headers_that_are_cut_short_are_not_believed(store, fault_proxy, quick):
    """http.client takes the end of a connection for the end of the headers: sizes, ETag and ranges are cut anywhere."""
    head = answer("206 X", b"", "Date: Sun, 22 Nov 2026 02:46:49 GMT", "Last-Modified: Sun, 22 Nov 2026 02:46:49 GMT",
                  'ETag: "12345678"', "x-amz-meta-k: v", "Content-Range: bytes 5-2999999/3000000")[1]  # fmt: skip
    head = head.replace(b"Content-Length: 0", b"Content-Length: 2999995")
    cuts = [("answer", head[:end]) for end in range(12, len(head), 9)]
    for first, second in zip(cuts[::2], cuts[1::2], strict=False):
        through, proxy = fault_proxy(store, iter([first, second]))
        assert object_store.read_range(through, "x.bin", 5, 3_000_000) == DATA[5:]
        assert proxy.faults == 2
    for cut in cuts[::6]:
        assert object_store.read_bytes(fault_proxy(store, iter([cut]))[0], "x.bin") == DATA
        assert object_store.size(fault_proxy(store, iter([cut]))[0], "x.bin") == 3_000_000
        assert object_store.list_names(fault_proxy(store, iter([cut]))[0]) == ["empty", "x.bin"]


@pytest.mark.s3
@pytest.mark.parametrize("refusal", [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests")])
def test_a_busy_store_is_asked_again(store, fault_proxy, quick, refusal):
    through, _ = fault_proxy(store, iter([refusal, refusal]))
    counts = ReadCounts()
    assert object_store.read_range(through, "x.bin", 0, 10, counts) == DATA[:10]
    assert (counts.requests, counts.retries, counts.resumed_reads) == (3, 2, 0)
    assert object_store.list_names(fault_proxy(store, iter([refusal]))[0]) == ["empty", "x.bin"]


@pytest.mark.s3
def test_the_budget_counts_attempts_without_progress(store, fault_proxy, quick, caplog):
    steps = [(503, "SlowDown")] * (s3.MAX_ATTEMPTS - 1) + [("close", 300_000)]
    through, proxy = fault_proxy(store, iter(steps * 3))
    assert object_store.read_range(through, "x.bin", 0, 3_000_000) == DATA
    assert proxy.faults == len(steps) * 3
    assert "attempt 8 of 9" in caplog.records[-1].message and caplog.records[-1].levelno == logging.WARNING
    through, proxy = fault_proxy(store, iter([(503, "SlowDown")] * s3.MAX_ATTEMPTS))
    with pytest.raises(OSError, match=r"9 attempts in \d+ s brought nothing, the last: .*SlowDown.*; check that the"):
        object_store.read_range(through, "x.bin", 0, 10)


def test_the_budget_is_spent_in_less_than_a_minute():
    assert 20 < sum(s3._pause_seconds(failures) for failures in range(1, s3.MAX_ATTEMPTS)) < 46
    assert s3.MAX_SECONDS + s3_store.READ_TIMEOUT_SECONDS < 60


@pytest.mark.s3
def test_a_store_that_hangs_again_and_again_is_given_up_in_time(store, fault_proxy, quick, monkeypatch):
    through, proxy = fault_proxy(store, iter([("stall", 0)] * 20))
    s3_store.client(s3_store.parse(through))  # takes a while to make
    monkeypatch.setattr(s3, "MAX_SECONDS", 1.2)
    with pytest.raises(OSError, match=r"[1-4] attempts in \d s brought nothing, the last: .*[Tt]ime"):
        object_store.read_range(through, "x.bin", 0, 10)
    assert 1 < proxy.faults < s3.MAX_ATTEMPTS


@pytest.mark.s3
@pytest.mark.slow
def test_200_seeded_faults_lose_and_double_no_byte(store, fault_proxy, quick):
    rng, counts = random.Random(4), ReadCounts()
    kinds = ["reset"] * 4 + ["close"] * 4 + ["stall"] + ["busy"] * 2

    def faults():
        while True:
            kind = rng.choice(kinds)
            if kind == "busy":
                yield rng.choice([(503, "SlowDown"), (500, "InternalError")])
            else:
                yield kind, rng.randrange(400 if rng.random() < 0.2 else 1_500_000)  # some in the headers

    through, proxy = fault_proxy(store, faults())
    while proxy.faults < 200:
        start = rng.randrange(2_900_000)
        stop = rng.randrange(start, min(start + 1_000_000, len(DATA)))
        assert object_store.read_range(through, "x.bin", start, stop, counts) == DATA[start:stop]
    assert counts.retries >= 190 and counts.resumed_reads > 50


@pytest.mark.s3
def test_an_object_replaced_under_a_read_is_told(store, fault_proxy, quick):
    """By the store, which refuses If-Match, or, where it ignores that, by its ETag."""

    def replacing(then):
        yield "close", 500_000
        put(store, "x.bin", DATA[::-1])
        yield then

    other = answer("206 X", DATA[::-1], 'ETag: "other"', "Content-Range: bytes 0-2999999/3000000")
    for then in (None, other):
        put(store, "x.bin", DATA)
        with pytest.raises(OSError, match=r"x\.bin: was replaced while it was read; open the set again"):
            object_store.read_range(fault_proxy(store, replacing(then))[0], "x.bin", 0, 3_000_000)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        ("200 OK", [], DATA),  # the whole object whatever the range
        ("200 OK", ["Content-Range: bytes 5-9/3000000"], DATA[5:10]),  # the range under the wrong status: rclone
        ("206 X", ["Content-Range: bytes 2-2999999/3000000"], DATA[2:]),  # more than was asked for
    ],
)
def test_the_right_bytes_are_taken_from_a_sloppy_answer(store, fault_proxy, status, headers, body):
    through, proxy = fault_proxy(store, iter([answer(status, body, 'ETag: "e"', *headers)]))
    assert object_store.read_range(through, "x.bin", 5, 10) == DATA[5:10]
    assert proxy.faults == 1


@pytest.mark.s3
@pytest.mark.parametrize("content_range", ["bytes 6-9/3000000", "bytes 5-9", "nonsense"])
def test_bytes_from_another_place_are_refused(store, fault_proxy, content_range):
    faults = iter([answer("206 X", DATA[5:10], 'ETag: "e"', f"Content-Range: {content_range}")])
    with pytest.raises(
        OSError, match=r"x\.bin: (expected bytes from 5 on, the store sent bytes from 6|.*Content-Range)"
    ):
        object_store.read_range(fault_proxy(store, faults)[0], "x.bin", 5, 10)


@pytest.mark.s3
def test_a_fork_makes_a_client_of_its_own(store):
    assert object_store.read_range(store, "x.bin", 0, 3) == DATA[:3]
    ours = id(s3_store.client(s3_store.parse(store)))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        theirs, data = pool.apply(_read_in_child, (store,))
    assert theirs != ours and data == DATA[3:6]
    assert id(s3_store.client(s3_store.parse(store))) == ours  # and a second call makes none


def _read_in_child(location):
    return id(s3_store.client(s3_store.parse(location))), object_store.read_range(location, "x.bin", 3, 6)


@pytest.mark.s3
@pytest.mark.slow
def test_a_store_killed_in_mid_read_and_started_again_finishes_it(store, fault_proxy, s3_server, monkeypatch):
    monkeypatch.setattr(s3, "_pause_seconds", lambda failures: 5)  # its start takes up to 20 s on a busy machine

    def kill():
        yield "close", 1_000_000
        s3_server.kill()
        starting.start()

    starting = threading.Thread(target=s3_server.start)
    counts = ReadCounts()
    read = object_store.read_range(fault_proxy(store, kill())[0], "x.bin", 0, 3_000_000, counts)
    starting.join()
    assert read == DATA and counts.resumed_reads >= 1
