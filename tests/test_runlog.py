"""The log of a run: every line, in order, without colours, bars and folders of this machine, and never too large."""

from pathlib import Path

import pytest

from dynamoe_lab.workbench import runlog
from dynamoe_lab.workbench.runlog import RunLog, log_tail


def said(folder) -> list[str]:
    return [line.partition("  ")[2] for line in (folder / "run.log").read_text().splitlines()]


def test_what_is_heard_in_pieces_becomes_lines(tmp_path):
    with RunLog(tmp_path, tmp_path) as log:
        log.line("begins")
        log.heard("one li")
        log.heard("ne\nsecond \x1b[31mred\x1b[0m\n10%\r50%\r100%\n")
        log.heard(f"wrote {tmp_path}/a.txt\nno end")
        log.line("cell 2\nends")
        log.heard("\x00\n\n")
    assert said(tmp_path) == ["begins", "one line", "second red", "100%", "wrote ./a.txt", "no end", "cell 2", "ends"]
    assert len(log_tail(tmp_path, 3)) == 3
    assert log_tail(tmp_path / "none") == []


def test_a_line_is_on_disk_at_once_and_a_new_run_begins_a_new_log(tmp_path):
    with RunLog(tmp_path) as log:
        log.line("first run")
        assert said(tmp_path) == ["first run"]  # a kill now loses nothing
    with RunLog(tmp_path) as log:
        log.line("second run")
    assert said(tmp_path) == ["second run"]


def test_the_log_is_capped_and_keeps_the_newest_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "_HALF", 10_000)
    with RunLog(tmp_path) as log:
        for number in range(2_000):
            log.heard(f"line {number}\n")
        log.heard("x" * 100_000)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["run.log", "run.log.1"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 26_000
    text = "".join((tmp_path / name).read_text() for name in reversed(files))
    assert "line 1999" in text
    assert "line 7\n" not in text
    with RunLog(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run.log"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_takes_lines_not_the_run(tmp_path, capfd):
    with Path("/dev/full").open("w") as full, RunLog(tmp_path) as log:
        log.line("fits")
        log._handler.setStream(full).close()
        log.line("does not")
        log.heard("nor this")
    assert said(tmp_path) == ["fits"]
    assert capfd.readouterr().err == ""
