"""Memory that a process frees and soon wants again: kept, instead of given back to the system.

On a processor, PyTorch asks the C library for the memory of every tensor. That of glibc returns a large piece to the
system as soon as it is free; the next tensor gets new pages, which the system has to clear when they are first touched.
PyTorch's tuning guide advises to preload another allocator; glibc itself keeps what is free if it is told to.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options of `mallopt`, from `malloc.h`."""


def keep_freed_memory() -> bool:
    """Let the C library keep what this process frees, for its next tensors: its memory then stays at its peak.

    Nothing changes where that library is not glibc, or where its user has set an option of it (an environment variable
    that begins with `MALLOC_`, or `GLIBC_TUNABLES`).

    Returns:
        Whether it is so now.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(M_MMAP_MAX, 0)) and bool(library.mallopt(M_TRIM_THRESHOLD, -1))
