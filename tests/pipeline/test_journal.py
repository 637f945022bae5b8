"""The journal: whole lines, each (name, step) once, whatever a kill left behind."""

import json
import math

import pytest

from pipeline.journal import Journal, JournalError, read_records


def points(path):
    records, _ = read_records(path)
    return [(name, record["step"], value) for record in records for name, value in record["metrics"].items()]


def test_a_line_cut_by_a_kill_is_removed(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.log(1, {"a": 1.0})
        journal.log(2, {"a": 2.0})
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])  # the kill came while line 2 was written
    with Journal(path) as journal:
        journal.log(2, {"a": 2.5})  # lost with its line, so it is new
    assert points(path) == [("a", 1, 1.0), ("a", 2, 2.5)]


def test_replayed_steps_are_not_written_again(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for step in (1, 2, 3):
            journal.log(step, {"a": step})
    with Journal(path) as journal:  # resumed from step 1
        for step in (2, 3, 4):
            journal.log(step, {"a": -step})
        journal.log(3, {"b": 30.0})  # another metric of a step on record is new
        journal.log(3, {"b": 31.0})
    assert points(path) == [("a", 1, 1.0), ("a", 2, 2.0), ("a", 3, 3.0), ("a", 4, -4.0), ("b", 3, 30.0)]


def test_a_file_is_recorded_once_per_step(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.log(1, files={"samples/1.png": "samples"})
        journal.log(1, files={"samples/1.png": "samples"})
    records, _ = read_records(path)
    assert [record["files"] for record in records] == [{"samples/1.png": "samples"}]


def test_non_finite_values_come_back(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.log(1, {"nan": math.nan, "inf": math.inf, "low": -math.inf})
    values = {name: value for name, _, value in points(path)}
    assert math.isnan(values["nan"]) and values["inf"] == math.inf and values["low"] == -math.inf


def test_a_reader_takes_whole_lines_in_portions(tmp_path):
    path = tmp_path / "journal.jsonl"
    lines = [json.dumps({"step": step, "metrics": {"a": step}}).encode() + b"\n" for step in range(20)]
    path.write_bytes(b"".join(lines) + b'{"step": 20, "met')  # the writer is in the middle of line 20
    found, start = [], 0
    while True:
        records, start = read_records(path, start, max_bytes=len(lines[0]) + 3)
        if not records:
            break
        assert len(records) <= 2
        found += [record["step"] for record in records]
    assert found == list(range(20))
    assert start == sum(map(len, lines))


@pytest.mark.parametrize("line", [b"no json", b"[1, 2]", b"\0\0\0\0"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"step": 1, "metrics": {"a": 1}}\n' + line + b'\n{"step": 2, "metrics": {"a": 1}}\n')
    with pytest.raises(JournalError, match=r"journal\.jsonl holds a damaged line"):
        Journal(path)
