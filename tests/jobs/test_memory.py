"""Freed memory stays with the process, so that a training step does not pay for it again."""

import os
import subprocess
import sys

PAGE_FAULTS = """
import ctypes
import os
import resource
import sys
from types import SimpleNamespace
import torch
from jobs.runtime.malloc import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    return sum(torch.ones(4_000_000 // 4) * i for i in range(5)).sum()  # some 4 MB at a time

def taken():
    for _ in range(10):
        step()
    before = faults()
    for _ in range(30):
        step()
    return faults() - before

# One process for each, forked from this one, because to import torch takes longer than all the rest.
glibc = "older" if os.fork() == 0 else "this"
if glibc == "older":
    libc = ctypes.CDLL(None)
    def mallopt(option, value):
        return 0 if option == -3 and value > 2**25 else libc.mallopt(option, value)
    ctypes.CDLL = lambda name: SimpleNamespace(mallopt=mallopt)

found = taken()
keep_freed_memory()
print(glibc, found, taken(), flush=True)
if glibc == "this":
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


PAGES = 4_000_000 // 4096  # of one such tensor


# glibc's own first choice, which it revises by chance as a program goes on.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def test_steps_after_the_first_ones_take_no_new_pages() -> None:
    """Older ones, as of Red Hat 8, refuse to keep blocks of more than 32 MB."""
    program = [sys.executable, "-c", PAGE_FAULTS]
    done = subprocess.run(program, env={**os.environ, **GIVE_BACK}, capture_output=True, text=True, check=True)
    found = {glibc: (int(before), int(after)) for glibc, before, after in map(str.split, done.stdout.splitlines())}
    assert found.keys() == {"this", "older"}
    for given_back, kept in found.values():
        assert given_back >= 100 * PAGES  # they come anew in every step
        assert kept <= 20 * PAGES  # the heap may still grow by some tensors, where small blocks lie in between
