import sys

from pipeline.bar import Bar


def test_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    clock = [0.0]
    with Bar(600, "building set", "images") as bar:
        for clock[0] in range(1, 61):
            bar.update(10)
    lines = capsys.readouterr().err.removesuffix("\r").splitlines()  # tqdm ends with one whatever it printed
    assert lines[0] == "building set: 100/600 images, 10.00 images/s, 00:50 left"
    assert len(lines) == 6  # one every ten seconds


def test_a_short_job_prints_nothing(capsys):
    with Bar(3, "building set", "images") as bar:
        bar.update(3)
    assert capsys.readouterr().err.strip() == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Bar(200_000_000, "verifying", "B", in_bytes=True) as bar:
        bar.update(200_000_000)
    err = capsys.readouterr().err
    assert "\rverifying: 100%|" in err
    assert "200M/200M" in err
