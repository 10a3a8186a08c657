"""Peak memory: an allocation of known size is what is measured, not what the process held before, nor what it takes later."""

import mmap
import time

import pytest

from dynamoe_lab.workbench import memory
from dynamoe_lab.workbench.memory import EXACT, SAMPLED, PeakMemory, peak_memory
from dynamoe_lab.workbench.steps import run_step

MB = 1 << 20
SIZE, SLACK = 160 * MB, 24 * MB


def takes(size: int) -> int:
    """Pages fresh from the system, whatever memory the allocator of this process has kept from earlier tests."""
    with mmap.mmap(-1, size) as pages:
        return int(pages.write(b"1" * MB) if size < MB else sum(pages.write(b"1" * MB) for _ in range(size // MB)))


def test_the_peak_of_a_piece_of_work_is_its_own():
    takes(2 * SIZE)  # earlier work that was larger
    with PeakMemory() as peak:
        takes(SIZE)
    assert peak.how == EXACT
    assert peak.bytes - peak.before == pytest.approx(SIZE, abs=SLACK)
    with PeakMemory() as later:
        pass
    assert later.bytes - later.before < SLACK
    assert peak_memory() >= peak.before + 2 * SIZE - SLACK  # of the whole process, as if nothing had been set back


def test_measurements_stand_within_each_other():
    with PeakMemory() as outer:
        takes(SIZE)
        with PeakMemory() as inner:
            takes(SIZE // 4)
    assert inner.bytes - inner.before == pytest.approx(SIZE // 4, abs=SLACK)
    assert outer.bytes - outer.before == pytest.approx(SIZE, abs=SLACK)


def test_where_the_mark_cannot_be_set_back_a_thread_looks(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none" / "clear_refs")
    with PeakMemory() as peak, mmap.mmap(-1, SIZE) as pages:
        for _ in range(SIZE // MB):
            pages.write(b"1" * MB)
        time.sleep(0.2)
    assert peak.how == SAMPLED
    assert peak.bytes - peak.before == pytest.approx(SIZE, abs=SLACK)


def test_a_step_keeps_its_own_peak(tmp_path):
    takes(2 * SIZE)
    made = run_step(takes, (SIZE,), home=tmp_path).made
    assert made["memory_measured"] == EXACT
    assert made["peak_memory_bytes"] - made["memory_before_bytes"] == pytest.approx(SIZE, abs=SLACK)
