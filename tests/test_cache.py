"""The cache: sizes as the disk has them, what is used and stale, and freeing that takes nothing from anybody."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
from test_records import make_record

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import environment, holds
from dynamoe_lab.workbench.cache import choose, free, period, size_on_disk, survey
from dynamoe_lab.workbench.files import locked
from dynamoe_lab.workbench.holds import held_steps
from dynamoe_lab.workbench.housekeeping import free_cache, list_cache
from dynamoe_lab.workbench.records import StepUse
from dynamoe_lab.workbench.steps import run_step


def numbers(count: int) -> dict:
    return {"numbers": list(range(count))}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache with two steps, one of them used by a report, unfinished and damaged work, an asset, and a link to elsewhere."""
    home, reports, elsewhere = tmp_path / "home", tmp_path / "reports", tmp_path / "elsewhere"
    used, unused = run_step(numbers, (50_000,), home=home), run_step(numbers, (10,), home=home)
    holds._noted.clear()  # as if another process had computed them
    for note in (home / "holds").iterdir():
        note.unlink()
    (home / "scratch" / "train-0123456789abcdef" / "output").mkdir(parents=True)
    (home / "steps" / f"{used.folder.name}.corrupt-2026").mkdir()
    (home / "assets" / "text").mkdir(parents=True)
    (home / "assets" / "text" / "a.txt").write_text("text")
    elsewhere.mkdir()
    (elsewhere / "precious.txt").write_text("precious")
    (home / "models").symlink_to(elsewhere)
    (home / "steps" / "train-fedcba9876543210").symlink_to(elsewhere)
    (home / "mine.txt").write_text("of a person")
    record = make_record("04_router_confusion")
    record.results.steps = [StepUse("numbers", used.key, True, 1.0)]
    folder = reports / "quick" / "04_router_confusion"
    folder.mkdir(parents=True)
    record.write(folder)
    return home, reports, used, unused


def names(entries) -> set[str]:
    return {entry.name for entry in entries}


def test_sizes_are_those_of_the_disk(tmp_path):
    big = tmp_path / "folder" / "big"
    big.parent.mkdir()
    big.write_bytes(b"x" * 300_000)
    alone = size_on_disk(big.parent)
    assert alone >= 300_000
    os.link(big, big.with_name("again"))
    (tmp_path / "outside").write_bytes(b"x" * 900_000)
    big.with_name("link").symlink_to(tmp_path / "outside")
    assert size_on_disk(big.parent) < alone + 50_000  # a second name and a link take next to nothing
    with (tmp_path / "sparse").open("wb") as stream:
        stream.truncate(1 << 30)
    assert size_on_disk(tmp_path / "sparse") < 1 << 20


def test_what_lies_in_the_cache_is_told(kept, monkeypatch):
    home, reports, used, unused = kept
    entries = {entry.name: entry for entry in survey(home, reports)}
    assert entries[used.folder.name].users == ["quick/04_router_confusion"]
    assert entries[unused.folder.name].users == []
    assert not entries[used.folder.name].stale
    kinds = {name: entry.kind for name, entry in entries.items()}
    assert kinds["train-0123456789abcdef"] == "unfinished"
    assert kinds[f"{used.folder.name}.corrupt-2026"] == "damaged"
    assert (kinds["text"], kinds["models"], kinds["train-fedcba9876543210"], kinds["mine.txt"]) == ("asset", "link", "link", "other")
    text = list_cache(home, reports)
    assert max(len(line) for line in text.splitlines()) <= 100
    counts = next(line.split() for line in text.splitlines() if line.startswith("numbers"))
    assert counts[:4] == ["numbers", "2", "1", "1"]  # two steps, one that no report uses, one damaged
    now = environment.room_digests(environment.ROOMS_WITHOUT_RESULTS)
    monkeypatch.setattr(environment, "code_digest", lambda without=(): "other")
    monkeypatch.setattr(environment, "room_digests", lambda without=(): now | {"training": "other"})
    stale = {entry.name: entry for entry in survey(home, reports)}[used.folder.name]
    assert (stale.stale, stale.rooms) == (True, ["training"])
    with pytest.raises(InputError, match="nothing in "):
        list_cache(home / "none", reports)


def test_freeing_what_is_unused_keeps_what_is_used(kept):
    home, reports, used, unused = kept
    gone, rest = free(home, choose(survey(home, reports), unused=True))
    assert names(gone) == {unused.folder.name}
    assert rest == []
    assert used.folder.exists()
    assert not unused.folder.exists()
    assert not (home / "locks" / f"{unused.folder.name}.lock").exists()
    assert run_step(numbers, (10,), home=home).cached is False  # it is computed again


def test_all_leaves_assets_links_and_what_is_not_ours(kept):
    home, reports, used, unused = kept
    chosen = choose(survey(home, reports), everything=True)
    gone, _ = free(home, chosen)
    assert {used.folder.name, unused.folder.name, "train-0123456789abcdef", f"{used.folder.name}.corrupt-2026"} <= names(gone)
    assert (home / "assets" / "text" / "a.txt").exists()
    assert (home / "mine.txt").exists()
    assert (home.parent / "elsewhere" / "precious.txt").exists()
    assert names(free(home, choose(survey(home, reports), assets=True))[0]) == {"text"}
    assert (home.parent / "elsewhere" / "precious.txt").exists()


def test_a_link_that_came_meanwhile_is_not_followed(kept):
    home, reports, _, unused = kept
    chosen = choose(survey(home, reports), unused=True)
    unused.folder.rename(home / "steps" / "moved")
    unused.folder.symlink_to(home.parent / "elsewhere")
    gone, rest = free(home, chosen)
    assert (gone, rest[0][1]) == ([], "a link, not followed")
    (home / "steps").rename(home.parent / "outside")
    (home / "steps").symlink_to(home.parent / "outside")
    unused.folder.unlink()
    (home / "steps" / "moved").rename(unused.folder)
    assert free(home, chosen)[1][0][1] == "lies outside of the cache"
    assert (home.parent / "outside" / unused.folder.name / "step.json").exists()


def test_what_a_process_makes_or_uses_is_kept_and_said(kept):
    home, reports, used, unused = kept
    said = []
    script = f"""
        import sys, time
        from pathlib import Path
        from dynamoe_lab.workbench.files import locked
        from dynamoe_lab.workbench.holds import hold_step
        home = Path({str(home)!r})
        hold_step(home, {used.folder.name!r})
        with locked(home / "locks" / "train-0123456789abcdef.lock"):
            print("ready", flush=True)
            sys.stdin.read()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        assert held_steps(home) == {used.folder.name: process.pid}
        free_cache(home, reports, agreed=lambda _: True, say=said.append, everything=True)
        text = "\n".join(said)
        assert f"kept {used.folder.name}: in use by pid {process.pid}" in text
        assert f"kept train-0123456789abcdef: being made by pid {process.pid}" in text
        assert used.folder.exists()
        assert (home / "scratch" / "train-0123456789abcdef").exists()
        assert not unused.folder.exists()
    finally:
        process.communicate("")
    assert held_steps(home) == {}  # the note of a dead process counts for nothing
    assert names(free(home, choose(survey(home, reports), everything=True))[0]) >= {used.folder.name, "train-0123456789abcdef"}


def test_an_asset_that_is_being_made_is_kept(tmp_path):
    (partial := tmp_path / "assets" / ".text.ab12_cd9.partial").mkdir(parents=True)
    with locked(tmp_path / "assets" / ".text.lock"):
        gone, rest = free(tmp_path, choose(survey(tmp_path, tmp_path / "reports"), scratch=True))
    assert (gone, rest[0][1]) == ([], f"being made by pid {os.getpid()}")
    assert names(free(tmp_path, choose(survey(tmp_path, tmp_path / "reports"), scratch=True))[0]) == {partial.name}
    assert not partial.exists()


def test_a_step_that_this_process_was_given_is_held(tmp_path):
    step = run_step(numbers, (3,), home=tmp_path)
    gone, rest = free(tmp_path, choose(survey(tmp_path, tmp_path / "reports"), unused=True))
    assert (gone, rest[0][1]) == ([], f"in use by pid {os.getpid()}")
    before = time.time() - 90_000
    os.utime(step.folder, (before, before))
    assert survey(tmp_path, tmp_path)[0].used == pytest.approx(before)
    run_step(numbers, (3,), home=tmp_path)
    assert survey(tmp_path, tmp_path)[0].used == pytest.approx(time.time(), abs=60)


def test_it_is_said_first_and_asked(kept):
    home, reports, used, unused = kept
    said, asked = [], []
    assert free_cache(home, reports, dry_run=True, agreed=asked.append, say=said.append, unused=True) == 0
    assert asked == []
    assert said[-1].startswith("would free 1 entry, ")
    assert unused.folder.name in said[0]
    assert free_cache(home, reports, agreed=lambda text: asked.append(text), say=said.append, unused=True) == 1
    assert asked[0].startswith("free 1 entry, ")
    assert unused.folder.exists()
    assert free_cache(home, reports, agreed=lambda _: True, say=said.append, stale=True) == 0
    assert said[-1] == "nothing to free"
    assert used.folder.exists()


def test_ages_are_read(kept):
    home, reports, used, _ = kept
    assert (period("30d"), period("12h"), period("1.5 w"), period("90min")) == (2_592_000, 43_200, 907_200, 5_400)
    with pytest.raises(InputError, match="--older-than 3 moons: give a number with min, h, d or w"):
        period("3 moons")
    with pytest.raises(InputError, match="say what"):
        choose([])
    old = time.time() - 7_200
    os.utime(used.folder, (old, old))
    entries = survey(home, reports)
    assert names(choose(entries, older_than=3_600)) == {used.folder.name}
    assert names(choose(entries, unused=True, older_than=3_600)) == set()
    with locked(home / "locks" / "x.lock"):
        pass  # a lock file that nobody holds goes with the rest
    free(home, choose(entries, everything=True))
    assert not (home / "locks" / "x.lock").exists()
