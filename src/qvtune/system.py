"""Memory, threads and imports of this process."""

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_M_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 4 * 2**20  # glibc's malloc.h; setting it also stops it from moving
_CGROUPS = {  # controllers in /proc/self/cgroup -> mount point, file of a group's limit, file of its usage
    "": ("/sys/fs/cgroup", "memory.max", "memory.current"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


@contextmanager
def heavy_imports() -> Iterator[None]:
    """For imports of torch, DeepSpeed, transformers and the like: 5.6 s of CPU time for all of them instead of 6.8 s.

    Python would collect garbage all the time, as so many objects are made. What has been imported stays until the end
    of the process; later collections, of which DeepSpeed requests several, leave it out: each takes 0.3 s less.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def return_freed_memory() -> None:
    """Give back what temporaries have left between the pieces that stay; glibc alone keeps it.

    At 1,024 ranks the statistics of one matrix are larger than all that the rank keeps of it. Without this the holes
    add up to several times the shard, which tests/model/test_scale.py notices.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have no such call
    if trim is not None:
        trim(ctypes.c_size_t(0))


def keep_no_large_blocks() -> None:
    """From now on give back every freed block of 4 MiB and more at once, in all threads.

    glibc raises the size from which it does so to that of the largest block freed so far, up to 32 MiB. Each thread
    then keeps a heap of its own with the holes of earlier temporaries: an 8B-shaped merge through NF4 takes 1.1 GB
    with 2 threads and 2.3 GB with 8; with this, in the same time, 0.7 and 1.1 GB.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have no such call
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that has started this one, up to the moment of the exec
        return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory() -> int:
    """Bytes of host memory that this process may still allocate: of the machine, and within its control groups."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = [int(lines["MemAvailable"].split()[0]) * 1024]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, version 1
            root, limit, used = _CGROUPS[controllers]
            group = Path(root, path.lstrip("/"))
            for folder in (group, *group.parents):
                if (folder / limit).is_file() and (text := (folder / limit).read_text().strip()) != "max":
                    free.append(int(text) - int((folder / used).read_text()))
    return min(free)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the context each operation runs on the thread that calls it."""
    import torch  # here: everything else in this module is needed before torch is imported

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
