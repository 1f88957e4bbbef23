"""Return the heap's free memory to the system."""

import ctypes
from contextlib import suppress


def trim_heap() -> None:
    """Return free memory of the C heap to the system, which glibc keeps for later allocations.

    Parsing a tokenizer of 262,144 tokens leaves half a GiB of it in the process, in pieces that
    tensors do not fit.
    """
    with suppress(OSError, AttributeError):  # no glibc: macOS, musl
        ctypes.CDLL("libc.so.6").malloc_trim(0)
