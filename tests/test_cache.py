"""The cache: sizes as the disk has them, what is used and stale, and freeing that takes nothing from anybody."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from test_records import make_record

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench import cache, environment, holds, steps
from dynamoe_lab.workbench.cache import choose, free, period, size_on_disk, survey
from dynamoe_lab.workbench.files import locked
from dynamoe_lab.workbench.holds import held_steps
from dynamoe_lab.workbench.housekeeping import free_cache, list_cache
from dynamoe_lab.workbench.records import StepUse
from dynamoe_lab.workbench.steps import run_step


def numbers(count: int) -> dict:
    return {"numbers": list(range(count))}


def forget_holds(home) -> None:
    """As if another process, which has ended, had computed and read what there is."""
    holds._noted.clear()
    for note in (home / "holds").iterdir():
        note.unlink()


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache with two steps, one of them used by a report, unfinished and damaged work, an asset, and a link to elsewhere."""
    home, reports, elsewhere = tmp_path / "home", tmp_path / "reports", tmp_path / "elsewhere"
    used, unused = run_step(numbers, (50_000,), home=home), run_step(numbers, (10,), home=home)
    forget_holds(home)
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


def free_all(kept, entries, **options):
    return {entry.name: reason for entry, reason in free(kept[0], entries, **options)[1]}


def test_what_changed_while_a_person_thought_is_kept(kept, monkeypatch):
    """The list is minutes old when the answer comes: what is other now is not what was agreed to."""
    home, reports, used, unused = kept
    (used.folder / "step.json").write_text("[]")
    damaged = [entry for entry in survey(home, reports) if entry.name == used.folder.name]
    assert [entry.kind for entry in damaged] == ["damaged"]
    with locked(home / "locks" / f"{used.folder.name}.lock"):
        assert free_all(kept, damaged) == {used.folder.name: f"being made by pid {os.getpid()}"}
    run_step(numbers, (50_000,), home=home)
    assert free_all(kept, damaged) == {used.folder.name: "made again since it was listed"}
    forget_holds(home)
    assert free_all(kept, damaged) == {used.folder.name: "made again since it was listed"}
    assert run_step(numbers, (50_000,), home=home).cached
    forget_holds(home)

    chosen = choose(survey(home, reports), unused=True)
    assert names(chosen) == {unused.folder.name}
    folder = reports / "quick" / "05_expert_usage"
    folder.mkdir()
    record = make_record("05_expert_usage")
    record.results.steps = [StepUse("numbers", unused.key, True, 1.0)]
    record.write(folder)
    assert free_all(kept, chosen, reports=reports) == {unused.folder.name: "used by quick/05_expert_usage since it was listed"}
    later = time.time() + 60
    os.utime(unused.folder, (later, later))
    assert free_all(kept, chosen) == {unused.folder.name: "used since it was listed"}

    digest = environment.code_digest(environment.ROOMS_WITHOUT_RESULTS)
    monkeypatch.setattr(environment, "code_digest", lambda without=(): "other")
    stale = choose(survey(home, reports), stale=True)
    monkeypatch.setattr(environment, "code_digest", lambda without=(): digest)
    assert set(free_all(kept, stale).values()) == {"made again since it was listed"}
    shutil.rmtree(unused.folder)
    assert free_all(kept, chosen) == {unused.folder.name: "is gone already"}


def test_a_step_that_is_noted_while_it_is_moved_comes_back(kept, monkeypatch):
    home, reports, _, unused = kept
    chosen, replace = choose(survey(home, reports), unused=True), os.replace

    def noted_first(source, target) -> None:
        if str(source) == str(unused.folder):
            holds.hold_step(home, unused.folder.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted_first)
    assert free_all(kept, chosen) == {unused.folder.name: f"in use by pid {os.getpid()}"}
    assert run_step(numbers, (10,), home=home).cached


def test_a_step_that_cannot_be_read_now_is_not_damaged(kept, monkeypatch):
    home, reports, used, unused = kept

    def fails(path):
        raise InputError("cannot be read") from OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(cache, "read_json", fails)
    chosen = choose(survey(home, reports), everything=True)
    kept_for = free_all(kept, chosen)
    assert (kept_for[used.folder.name], kept_for[unused.folder.name]) == ("cannot be read now", "cannot be read now")


def test_documents_whose_freeing_was_killed_are_freed(kept):
    home, reports, _, _ = kept
    for name in (".datasets.partial", ".mine.partial"):
        (home / name).mkdir()
        (home / name / "a.txt").write_text("text")
    kinds = {entry.name: entry.kind for entry in survey(home, reports)}
    assert (kinds[".datasets.partial"], kinds[".mine.partial"]) == ("unfinished", "other")
    assert ".datasets.partial" in names(free(home, choose(survey(home, reports), scratch=True))[0])
    assert not (home / ".datasets.partial").exists()
    assert (home / ".mine.partial" / "a.txt").exists()


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


def test_a_note_that_could_not_be_written_is_written_later(tmp_path):
    """With the real identity of the process, or it counts as one of the dead and is removed."""
    (tmp_path / "holds").write_text("in the way")
    holds.hold_step(tmp_path, "first")
    (tmp_path / "holds").unlink()
    assert held_steps(tmp_path) == {}
    holds.hold_step(tmp_path, "second")
    assert held_steps(tmp_path) == {"first": os.getpid(), "second": os.getpid()}
    assert [path.name for path in (tmp_path / "holds").iterdir()] == [f"{os.getpid()}.txt"]


def looks(home: Path, reports: Path) -> list:
    (home / "assets" / "text").mkdir(parents=True)
    return [(entry.name, entry.held) for entry in survey(home, reports) if entry.kind == "asset"]


looks.step_ignores = ("home", "reports")


def test_what_a_first_step_reads_is_held_while_it_computes(tmp_path):
    assert run_step(looks, (tmp_path, tmp_path), home=tmp_path).value == [["text", f"in use by pid {os.getpid()}, perhaps"]]


def test_a_step_is_noted_before_it_is_looked_for(kept, monkeypatch):
    """Between the look and the note it could be freed."""
    home, _, _, unused = kept
    seen, published = [], steps._published

    def look(folder, key):
        seen.append(set(held_steps(home)))
        return published(folder, key)

    monkeypatch.setattr(steps, "_published", look)
    for way in (run_step, steps.find_step):
        assert way(numbers, (10,), home=home).cached
        forget_holds(home)
    assert seen == [{unused.folder.name}] * 2


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
