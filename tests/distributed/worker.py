"""One rank of a test: python -m tests.distributed.worker JOBS.json FOLDER

JOBS.json is a list of {"name", "do": one of JOBS, ...its arguments}. They run in this one process, since starting it
costs more than all of them; what a job returns is kept under its name in FOLDER/rank-N.json. A job that fails ends it.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections import Counter
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes.functional as bnb
import torch
from deepspeed.utils import groups
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.config.schema import RunConfig
from qvtune.data.batch import collate
from qvtune.distributed import process_group, stop
from qvtune.distributed.fake_ranks import gathered_bytes
from qvtune.distributed.stop import StopRequest
from qvtune.errors import StopRequested, UserError
from qvtune.model.fingerprint import ContentChecksums
from qvtune.model.nf4 import NF4Linear
from qvtune.storage.safetensors import TensorFiles
from qvtune.system import peak_rss_bytes
from qvtune.train import loop, save
from qvtune.train import prepare as train_prepare
from qvtune.train.prepare import prepare
from tests.distributed.gathered import gathered
from tests.model.one_of_many import resident_bytes_now
from tests.support.varlen_attention import register_varlen

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h
LEAKING = "leaking"  # beside the VARLEN of tests/support/varlen_attention.py


def leaking_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **unused: Any
) -> tuple[torch.Tensor, None]:
    """[B, heads, T, D] -> [B, T, heads, D], causal over the whole row: a kernel that is not told of the documents."""
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None


def train(
    config: dict[str, Any],
    attention: str | None = None,
    signal_at: dict[str, Any] | None = None,
    error: str | None = None,
    unchecked_base: bool = False,
) -> dict[str, Any]:
    """The real ``train``: its exit code, or the message of the ``error`` that must come.

    ``attention`` is what ``choose_attention`` finds, where that is not what it finds here. ``signal_at``: see
    ``SignalAt``; the ranks then meet before every micro-batch. ``unchecked_base`` lets a base with NaN through.
    """
    expected: Any = () if error is None else EXPECTED[error]
    with (
        SignalAt(**signal_at).patched() if signal_at else nullcontext(),
        patch.object(stop, "AGREE_SECONDS", 0.0) if signal_at else nullcontext(),
        patch("qvtune.train.preflight.choose_attention", lambda *_: (attention, "of the test"))
        if attention
        else nullcontext(),
        # DeepSpeed keeps the groups of hpZ, and refuses to make them twice in a process.
        patch.object(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", None),
        patch.object(ContentChecksums, "fingerprint", lambda *_: {}) if unchecked_base else nullcontext(),
    ):
        try:
            return {"code": loop.train(RunConfig.model_validate(config))}
        except expected as raised:
            return {"message": str(raised)}


class SignalAt:
    """Signals ``number`` before call ``nth`` of ``function`` (its path): rank 0 to rank ``to``, or each to itself."""

    def __init__(self, function: str, nth: int, number: int, to: int | None = None) -> None:
        self.function, self.nth, self.number, self.calls = function, nth, number, 0
        pids = process_group.all_gather_object(os.getpid())
        self.receiver = (
            pids[process_group.rank() if to is None else to] if to is None or process_group.is_main() else None
        )

    def patched(self) -> Any:
        """Within this context the function is the one that signals."""
        module, _, name = self.function.rpartition(".")
        original = getattr(import_module(module), name)

        def wrapper(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self.nth and self.receiver is not None:
                self._send(self.receiver)
            return original(*arguments)

        return patch(self.function, wrapper)

    def _send(self, receiver: int) -> None:
        if self.number == signal.SIGKILL:
            process_group.barrier()  # the step before is done on all ranks
        os.kill(receiver, self.number)
        time.sleep(1)  # more than it takes to be noticed


def give_back_freed_blocks() -> None:
    """glibc would keep what is freed between other things, several times the base; 64 KiB and more go back at once."""
    set_option = ctypes.CDLL(None).mallopt
    assert set_option(_M_MMAP_THRESHOLD, 65536) == set_option(_M_ARENA_MAX, 1) == 1


def memory(config: dict[str, Any]) -> dict[str, int]:
    """Bytes of a training: resident before the base is read, at their peak in the steps, and those of the base."""
    noted: dict[str, int] = {}

    def load(*arguments: Any) -> Any:
        noted["idle"] = resident_bytes_now()
        loaded = load_model(*arguments)
        noted["base"] = loaded[1].base_bytes
        return loaded

    def prepare_and_forget(*arguments: Any) -> Any:
        run = prepare(*arguments)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far
        return run

    give_back_freed_blocks()
    load_model = train_prepare._load_model
    with patch.object(train_prepare, "_load_model", load), patch.object(loop, "prepare", prepare_and_forget):
        assert loop.train(RunConfig.model_validate(config)) == loop.EXIT_DONE
    return {**noted, "peak": peak_rss_bytes()}


class _Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation makes. A view makes none."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_bytes = max([self.num_bytes, *(tensor.nbytes for tensor in tensors)])
        return result


class _Gathers(TorchDispatchMode):
    """Counts bytes that collectives gather, by the number of ranks of their group."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.update(gathered_bytes(func, args))
        return func(*args, **(kwargs or {}))


def gathers(config: dict[str, Any]) -> dict[str, Any]:
    """Bytes gathered in each optimizer step by the number of ranks of the group; bytes of the frozen base, and of what
    is trained or stays whole."""
    noted: dict[str, Any] = {"steps": []}

    def step(run: Any, *arguments: Any) -> Any:
        with _Gathers() as counted:
            result = optimizer_step(run, *arguments)
        noted["steps"].append(dict(counted.found))
        parameters = list(run.engine.module.parameters())
        small = [one for one in parameters if one.requires_grad or one.ds_persist]
        for name, some in {"all": parameters, "small": small}.items():
            noted[name] = sum(one.ds_numel * one.element_size() for one in some)
        return result

    optimizer_step = loop._optimizer_step
    with patch.object(loop, "_optimizer_step", step):
        assert loop.train(RunConfig.model_validate(config)) == loop.EXIT_DONE
    return noted


def shares(config: dict[str, Any]) -> dict[str, Any]:
    """What this rank verifies, reads, and holds while gathering, in a training that resumes and saves once."""
    noted: dict[str, Any] = {"hashed": 0, "read": {}, "gathered": 0, "largest": 0}

    def read(files: TensorFiles, name: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        data = real_read(files, name, start, end)
        file = files[name].file.name
        noted["read"][file] = noted["read"].get(file, 0) + data.nbytes
        return data

    def hash_file(path: Path) -> str:
        noted["hashed"] += 1
        return real_hash(path)

    def gather(engine: Any) -> Any:
        with _Largest() as largest:
            state = real_gather(engine)
        noted.update(gathered=len(state), largest_bytes=largest.num_bytes)
        return state

    real_read, real_hash, real_gather = TensorFiles.read, checkpoint_folder.sha256, save.gather_state
    with (
        patch.object(TensorFiles, "read", read),
        patch.object(checkpoint_folder, "sha256", hash_file),
        patch.object(save, "gather_state", gather),
    ):
        assert loop.train(RunConfig.model_validate(config)) == loop.EXIT_DONE
    return noted


def base(config: dict[str, Any]) -> dict[str, Any]:
    """A prepared run's base against the file and bitsandbytes, and its loss on the first row of the data."""
    run = prepare(RunConfig.model_validate(config), StopRequest())
    stored = load_file(run.plan.folder / "model.safetensors")
    tensors = {name: tensor.to(run.plan.dtype) for name, tensor in stored.items()}
    checked, different = [], []
    for path, module in run.engine.module.model.get_base_model().named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            continue
        expected = _expected_pieces(module, tensors, path.replace(".base_layer", ""))
        checked += [f"{path}.{piece}" for piece in expected]
        different += [f"{path}.{piece}" for piece in _unequal_pieces(module, expected)]
    with torch.no_grad():
        summed = run.engine(collate([run.plan.rows[0]], run.plan.pad_token_id)).item()
    return {
        "checked": checked,
        "different": different,
        "loss": summed / int(run.plan.rows.num_label_tokens[0]),
        "base_bytes": run.load.base_bytes,
    }


def _expected_pieces(module: Any, tensors: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """What a module's own parameters and its offset must be, made from whole tensors."""
    if not isinstance(module, NF4Linear):
        return {name: tensors[f"{path}.{name}"] for name, _ in module.named_parameters(recurse=False)}
    codes, state = bnb.quantize_4bit(
        tensors[f"{path}.weight"], blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return {"weight": codes, "absmax": state.absmax, "nested_absmax": state.state2.absmax, "offset": state.offset}


def _unequal_pieces(module: Any, expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of the pieces that differ in any bit. NF4's lie in fp32 storage, zeros at the end."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(module.parameters(recurse=False))):
        stored = {name: _bytes(getattr(module, name)) for name in expected}
        return [
            name for name, piece in expected.items() if not torch.equal(stored[name][: piece.nbytes], _bytes(piece))
        ]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


EXPECTED = {"UserError": UserError, "RuntimeError": RuntimeError, "StopRequested": StopRequested}
JOBS = {"train": train, "base": base, "memory": memory, "gathers": gathers, "shares": shares, "gathered": gathered}


def main() -> None:
    """Run the jobs."""
    jobs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    process_group.start()
    register_varlen()
    AttentionInterface.register(LEAKING, leaking_attention)
    results: dict[str, Any] = {}
    for job in jobs:
        arguments = {key: value for key, value in job.items() if key not in ("name", "do")}
        results[job["name"]] = JOBS[job["do"]](**arguments)
        (folder / f"rank-{process_group.rank()}.json").write_text(json.dumps(results))
    process_group.stop()


if __name__ == "__main__":
    main()
