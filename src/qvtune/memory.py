"""What this process occupies."""

import ctypes
import resource
import sys
from pathlib import Path


def return_freed_memory() -> None:
    """Give back what temporaries have left between the pieces that stay; glibc alone keeps it.

    At 1,024 ranks the statistics of one matrix are larger than all that the rank keeps of it. Without this the holes
    add up to several times the shard, which tests/base/test_scale.py notices.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have no such call
    if trim is not None:
        trim(ctypes.c_size_t(0))


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that has started this one, up to the moment of the exec
        return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
