"""How this process gets memory from the system."""

import ctypes
import sys
from contextlib import suppress

# Parameters of glibc's `mallopt` (man 3 mallopt), and values for few, large requests that are kept.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
SETTINGS = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**28}


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees, for the next tensors. On Linux with glibc only.

    Otherwise every large tensor on a CPU is new memory, which the system clears page by page. On two cores with bf16
    instructions an update of the CPU recipe's denoiser took 0.82 s with this and 0.98 s without. Other allocators,
    which a user may preload, ignore it.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in SETTINGS.items():
            mallopt(parameter, value)
