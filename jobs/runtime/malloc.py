"""Keeps freed memory for reuse (glibc), and looks for none to free while libraries are imported."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# malloc.h of glibc.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Lets glibc keep what tensors on a CPU free, for the tensors that follow; elsewhere it does nothing.

    Otherwise glibc gives large blocks back to the system at once, and each step pays a page fault for every 4 kB that
    it takes again: with large tensors a third of a training step (benchmarks/README.md). The peak stays the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        # Blocks above this are mapped one by one, and go back to the system when freed, whatever the line above says.
        # Older glibc refuses more than half a heap of a thread's, 32 MB. Refused altogether, it would be 128 kB from
        # here on, because the line above ends its growth.
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)


@contextmanager
def importing() -> Iterator[None]:
    """While entered, Python collects no garbage: importing torch makes hardly any, and looking for it takes a quarter
    of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
