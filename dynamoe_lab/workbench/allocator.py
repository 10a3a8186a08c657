"""Let glibc keep freed memory: tensors of many megabytes that live for a moment otherwise cost page faults, again and again.

Its defaults give a large block back to the kernel as soon as it is freed, and the next one like it is zeroed and mapped page by page.
"""

import ctypes
import platform

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Tell this process's allocator to keep what is freed for what comes next; the process then holds its peak memory until it ends.

    Commands and notebooks of the workbench do it at their start; in your own script it is one call before the first forward pass.

    Returns:
        Whether it took effect; False where the C library is not glibc.

    Example:
        >>> lab.keep_freed_memory() in (True, False)  # True on Linux with glibc
        True
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))  # no block mapped on its own; the heap never shrinks
