"""Freed memory stays with the process: seen from the page faults of a fresh one."""

import os
import platform
import subprocess
import sys

import pytest

# A block of 64 MB, twice: with glibc's defaults it is mapped, faulted in page by page and given back both times.
PROBE = """
import ctypes, resource, sys
from dynamoe_lab.workbench.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_freed_block_is_not_faulted_in_again():
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    faults = {}
    for choice in ("leave", "keep"):
        command = [sys.executable, "-c", PROBE, choice]
        kept, count = subprocess.run(command, env=plain, capture_output=True, text=True, check=True).stdout.split()
        assert kept == str(choice == "keep")
        faults[choice] = int(count)
    assert faults["keep"] < 100 < faults["leave"]


def test_another_c_library_is_left_alone(monkeypatch):
    from dynamoe_lab.workbench.allocator import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("asked the C library"))
    assert keep_freed_memory() is False
