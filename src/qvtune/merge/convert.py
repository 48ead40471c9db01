"""From a checkpoint to one ordinary Hugging Face folder, which appears only when it has been proved."""

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from qvtune.base import fingerprint, prequantized
from qvtune.base.companions import copy_companions
from qvtune.base.fingerprint import Fingerprint, content_of
from qvtune.base.loader import Base
from qvtune.base.writer import write_model
from qvtune.config.schema import ModelSection
from qvtune.errors import UserError
from qvtune.files import write_json
from qvtune.merge.adapter import Adapter
from qvtune.merge.base import BaseChoice, open_base_of
from qvtune.merge.output import model_output, require_free, write_config
from qvtune.merge.proof import (
    EXACT,
    ROUNDED,
    Proof,
    compare,
    evaluation_rows,
    fixed_prompts,
    load_adapted,
    load_merged,
)
from qvtune.merge.report import MergeReport, show
from qvtune.merge.source import Source, open_source
from qvtune.merge.tensors import Merger
from qvtune.report.console import console

DtypeChoice = Literal["auto", "bf16", "fp16", "fp32", "bfloat16", "float16", "float32"]
_SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DEFAULT_SHARD_BYTES = 5_000_000_000


class ProofError(UserError):
    """The merged model does not compute what base and adapter compute."""

    exit_code = 1


@dataclass(frozen=True)
class _Task:
    """A merge that can be done: ``model`` says what the base is loaded as, ``adapter`` fits it."""

    source: Source
    model: ModelSection
    base: Path
    opened: Base
    adapter: Adapter
    dtype: torch.dtype


def convert(
    source: Path,
    output: Path,
    *,
    base_weights: BaseChoice | None = None,
    dtype: DtypeChoice = "auto",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    proof_rows: int | None = None,
    base: str | None = None,
    allow_pickle: bool = False,
) -> MergeReport:
    """Merge the adapter of a checkpoint into its base; ``output`` then loads with ``AutoModelForCausalLM``.

    ``source`` is anything that ``open_source`` takes, with ``base`` and ``allow_pickle``. ``base_weights``: what the
    adapter is added to, and what its neighbours are: ``dequantized`` = the NF4 values it was trained against (default
    where it was), ``original`` = the base's own. ``dtype`` of the computed matrices: ``auto`` = training's.
    ``proof_rows``: rows of the run's evaluation data that are compared as well (None: 8 where they can be found).

    Raises UserError for what cannot be merged, ProofError where the proof fails; ``output`` does not appear then.
    """
    started = time.monotonic()
    _check_numbers(max_shard_bytes, proof_rows)
    require_free(output)
    task = _open(open_source(source, base=base, allow_pickle=allow_pickle), base_weights, dtype, allow_pickle)
    merger = Merger(task.opened, task.adapter, task.dtype)
    plans = merger.plan()
    console().print(f"merging {task.source.path} into {task.base}: {len(plans)} tensors")
    with model_output(output) as folder:
        files = write_model(folder, plans, merger.tensor, max_shard_bytes)
        prequantized.note_descriptions(task.opened.weights, task.opened.stored)
        _require_base(task.source, content_of(task.opened.weights, lambda own: [own], torch.device("cpu")))
        copy_companions(task.base, folder)
        write_config(task.base, folder, task.dtype, task.adapter.config)
        report = MergeReport(
            checkpoint=str(task.source.path),
            step=task.source.step,
            base=task.model.name_or_path,
            base_weights="dequantized" if task.opened.quantized() else "original",
            trained_on=task.source.model.quantization,
            dtype=str(task.dtype).removeprefix("torch."),
            scaling=task.adapter.scaling,
            files=files,
            bytes=sum(plan.num_bytes for plan in plans),
            tensors=dict(Counter(merger.kind(plan.name) for plan in plans)),
            updates=merger.updates,
            proof=_prove(task, folder, proof_rows),
            seconds=time.monotonic() - started,
        )
        show(report, output)
        if not report.proof.passed:
            raise ProofError(f"{output} was not written: the merged model is not base + adapter, see the table")
        write_json(folder / "merge_report.json", asdict(report))
    return report


def _check_numbers(max_shard_bytes: int, proof_rows: int | None) -> None:
    problems = []
    if max_shard_bytes <= 0:
        problems.append(f"--max-shard-bytes: {max_shard_bytes}; must be greater than 0")
    if proof_rows is not None and proof_rows < 0:
        problems.append(f"--proof-rows: {proof_rows}; must be 0 (fixed prompts alone) or more")
    if problems:
        raise UserError(problems)


def _open(source: Source, base_weights: BaseChoice | None, dtype: DtypeChoice, allow_pickle: bool) -> _Task:
    """Find and check everything that is read. Raises UserError."""
    opened = open_base_of(source, base_weights, allow_pickle)
    adapter = source.adapter(opened.base.tensors())
    merged_dtype = opened.dtype if dtype == "auto" else getattr(torch, _SHORT_NAMES.get(dtype, dtype))
    return _Task(source, opened.model, opened.folder, opened.base, adapter, merged_dtype)


def _require_base(source: Source, found: Fingerprint) -> None:
    if source.fingerprint is not None:
        advice = f"{source.path} was trained on another base; give that one"
        fingerprint.require_same(source.fingerprint, found, "the base (model.name_or_path)", advice)


def _prove(task: _Task, folder: Path, num_rows: int | None) -> Proof:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=task.model.trust_remote_code)
    texts = fixed_prompts(tokenizer) + evaluation_rows(tokenizer, task.source.path, num_rows)
    adapted = load_adapted(task.base, task.model, task.source.path, task.adapter.dtype)
    return compare(adapted, load_merged(folder, task.model), texts, EXACT if _keeps_all_bits(task) else ROUNDED)


def _keeps_all_bits(task: _Task) -> bool:
    """Whether neither the merge nor training has rounded any weight to 16 bits."""
    trained = task.adapter.dtype
    as_stored = all(torch.promote_types(tensor.dtype, trained) == trained for tensor in task.opened.weights.values())
    return as_stored and task.dtype == torch.float32
