"""Runs a command: prints a UserError once and turns the outcome into an exit code that all ranks share.

A command comes in two parts. The first checks what was typed and imports nothing heavy, so that a typo is answered at
once; the second imports torch and does the work.
"""

import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

from qvtune.distributed.stop_signals import record_stop_signals, take_recorded
from qvtune.errors import StopRequested, UserError
from qvtune.system import heavy_imports

Checked = TypeVar("Checked")
_ALLOCATOR_SETTINGS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
_WAIT_SECONDS, _WAIT_POLLS = 10.0, 100  # of other ranks for the launcher to end them


def run_command(check: Callable[[], Checked], command: Callable[[Checked], int]) -> int:
    """Run ``check`` on every rank by itself, start the process group, run ``command`` and return the exit code.

    A UserError of ``check`` is printed by rank 0 and gives exit code 2. Later a UserError is raised on all ranks
    (``process_group.raise_on_all_ranks``), printed once, by rank 0, and gives exit code 2. A StopRequested gets here
    only if there was nothing to save yet; it is raised on all ranks too and gives 75. Any other exception ends this
    rank with a traceback, without collectives: the launcher ends the others. Stop signals are recorded from the start.
    """
    record_stop_signals()
    try:
        checked = check()
    except UserError as error:
        _print_before_start(error)
        return error.exit_code
    before_imports()
    with heavy_imports():
        from qvtune.distributed import process_group  # imports torch, which takes seconds
    try:
        process_group.start()
        code = command(checked)
    except UserError as error:
        if process_group.is_main():
            _print(error)
        code = error.exit_code
    except StopRequested as request:
        if process_group.is_main():
            sys.stderr.write(f"{request} before the first step; there was nothing to save: start again\n")
        code = request.exit_code
    process_group.stop()
    return code


def run_alone(command: Callable[[], object]) -> int:
    """Run ``command`` without a process group; 0, or the exit code of UserError or StopRequested, which are printed."""
    before_imports()
    try:
        command()
    except UserError as error:
        _print(error)
        return error.exit_code
    except StopRequested as request:
        sys.stderr.write(f"{request}\n")
        return request.exit_code
    return 0


def run_on_rank_0(command: Callable[[], object]) -> int:
    """``run_alone`` in the process of rank 0, as if no launcher had started it; other ranks do nothing and return 0."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(variable, None)
    return run_alone(command)


def before_imports() -> None:
    """Settings of libraries that have to be made before they are imported."""
    # FutureWarnings that libraries cause in each other: the user cannot change anything about them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|transformers")
    # bitsandbytes and DeepSpeed decorate functions that are never called here with torch.compile, which imports
    # TorchInductor: a sixth of all import time. Nothing in this project is compiled.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Gathered layers come and go in many sizes: with fixed segments the allocator's holes grow to gigabytes.
    if not os.environ.keys() & _ALLOCATOR_SETTINGS:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _print_before_start(error: UserError) -> None:
    """Print an error that was found without a process group.

    Other ranks usually find the same error as rank 0. They wait: rank 0 prints it and exits, at which the launcher
    sends them SIGTERM. A rank that receives none has an error that rank 0 does not have (a file that is missing on its
    host), so it prints it and names itself.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        for _ in range(_WAIT_POLLS):
            if take_recorded():
                return
            time.sleep(_WAIT_SECONDS / _WAIT_POLLS)
        sys.stderr.write(f"rank {rank} on {socket.gethostname()}:\n")
    _print(error)


def _print(error: UserError) -> None:
    for problem in error.problems:
        sys.stderr.write(f"error: {problem}\n")
