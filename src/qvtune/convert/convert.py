"""From a checkpoint to one ordinary Hugging Face folder, which appears only when it has been proved."""

import importlib.metadata
import os
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import qvtune
from qvtune.config.outputs import MERGED_SHARD_BYTES, BaseChoice, DtypeChoice, FormatName, ReaderName
from qvtune.console import console
from qvtune.convert.conversion import Conversion, open_conversion
from qvtune.convert.formats import OutputFormat, output_format
from qvtune.convert.merge.write import Written, made_from
from qvtune.convert.sources.source import open_source
from qvtune.data import IGNORE_INDEX
from qvtune.errors import ProofError, UserError
from qvtune.storage.files import write_json
from qvtune.storage.partial import partial_output, require_free
from qvtune.system import keep_no_large_blocks, return_freed_memory

if TYPE_CHECKING:  # imported where they are used: they bring transformers, which the merge itself does without
    from qvtune.convert.proof.layers import LayeredModel
    from qvtune.convert.proof.proof import Result
    from qvtune.convert.readers.check import ReaderCheck
    from qvtune.convert.report import MergeReport

_VERSIONS = ("bitsandbytes", "peft", "safetensors", "torch", "transformers")


def convert(
    source: Path,
    output: Path,
    *,
    base_weights: BaseChoice | None = None,
    dtype: DtypeChoice = "auto",
    max_shard_bytes: int = MERGED_SHARD_BYTES,
    proof_rows: int | None = None,
    num_threads: int | None = None,
    base: str | None = None,
    allow_pickle: bool = False,
    format: FormatName = "merged",
    check_with: ReaderName | None = None,
) -> "MergeReport":
    """Merge the adapter of a checkpoint into its base; ``output`` then loads with ``AutoModelForCausalLM``.

    ``format`` other than ``merged``: ``adapter`` = the adapter alone, for PEFT; ``bnb-4bit`` = merged and quantized
    again; ``gguf`` = merged, for llama.cpp.

    ``source`` is anything that ``open_source`` takes, with ``base`` and ``allow_pickle``. ``base_weights``: what the
    adapter is added to, and what its neighbours are: ``dequantized`` = the NF4 values it was trained against (default
    where it was, but for ``bnb-4bit``), ``original`` = the base's own. ``dtype`` of the computed matrices:
    ``auto`` = training's.
    ``proof_rows``: rows of the run's evaluation data that are compared as well (None: 8 where they can be found).
    ``num_threads`` None: as many as this process has cores; the bytes do not depend on it.

    ``check_with``: a reader whose greedy tokens, with ``output`` loaded in a process of its own, must be those of what
    was written (``qvtune.convert.readers``).

    A start with the arguments of one that was cut off goes on where that one was. Raises UserError for what cannot be
    merged, ProofError where the proof fails, ReaderError where the reader fails or differs; ``output`` does not appear
    then, but the next start goes on from what was written for the reader.
    """
    started = time.monotonic()
    keep_no_large_blocks()
    _check_numbers(max_shard_bytes, proof_rows, num_threads)
    require_free(output)
    opened = open_source(source, base=base, allow_pickle=allow_pickle)
    conversion = open_conversion(opened, base_weights, dtype, allow_pickle=allow_pickle)
    chosen = output_format(format)
    if base_weights is None and chosen.PREFERS is not None and conversion.other_choice == chosen.PREFERS:
        conversion = open_conversion(opened, chosen.PREFERS, dtype, allow_pickle=allow_pickle)
    chosen.require(conversion)
    layered = _architecture(conversion)
    if check_with is not None:
        _require_readable(check_with, conversion, chosen)
    with partial_output(output, made_from(conversion, max_shard_bytes) | {"format": format}) as partial:
        console().print(
            f"merging {conversion.source.path} into {conversion.base.folder}: {len(conversion.base.tensors)} tensors"
        )
        written = chosen.write(partial, conversion, max_shard_bytes, num_threads or len(os.sched_getaffinity(0)))
        return_freed_memory()
        result = _prove(conversion, layered, chosen, partial.folder, proof_rows)
        report = _report(conversion, format, written, result, time.monotonic() - started)
        _require_proved(report, output)
        if check_with is not None:
            report = replace(report, check=_check(check_with, conversion, layered, chosen, partial.folder))
        _finish(report, conversion, chosen, partial.folder, output)
    return report


def _check_numbers(max_shard_bytes: int, proof_rows: int | None, num_threads: int | None) -> None:
    problems = []
    if max_shard_bytes <= 0:
        problems.append(f"--max-shard-bytes: {max_shard_bytes}; must be greater than 0")
    if proof_rows is not None and proof_rows < 0:
        problems.append(f"--proof-rows: {proof_rows}; must be 0 (fixed prompts alone) or more")
    if num_threads is not None and num_threads <= 0:
        problems.append(f"--num-threads: {num_threads}; must be greater than 0")
    if problems:
        raise UserError(problems)


def _architecture(conversion: Conversion) -> "LayeredModel":
    """The model without weights. Raises UserError where it could not be proved, before anything is written."""
    from qvtune.convert.proof.layers import empty_model

    layered = empty_model(conversion.base.folder, conversion.settings, conversion.model.trust_remote_code)
    for base in filter(None, (conversion.base, conversion.other_base)):
        layered.require_names(base.tensors.keys() | conversion.adapter.added.keys(), str(base.folder))
    return layered


def _prove(
    conversion: Conversion, layered: "LayeredModel", chosen: OutputFormat, folder: Path, num_rows: int | None
) -> "Result":
    from qvtune.convert.proof.proof import prove
    from qvtune.convert.proof.texts import Text, evaluation_rows, fixed_prompts

    tokenizer = conversion.tokenizer
    run = conversion.source.path if conversion.source.state is not None else None
    texts = fixed_prompts(tokenizer) + evaluation_rows(tokenizer, run, num_rows)
    if conversion.is_classifier:  # one position of logits a text: those of the classes
        texts = [Text(text.ids, [IGNORE_INDEX]) for text in texts]
    return prove(layered, chosen.views(conversion, folder), texts, chosen.limits(conversion))


def _report(
    conversion: Conversion, format: FormatName, written: Written, result: "Result", seconds: float
) -> "MergeReport":
    from qvtune.convert.report import MergeReport, rounding_warnings

    dtype = str(conversion.dtype).removeprefix("torch.")
    return MergeReport(
        format=format,
        checkpoint=str(conversion.source.path),
        step=conversion.source.step,
        base=conversion.model.name_or_path,
        base_weights=conversion.base_weights,
        trained_on=conversion.source.model.quantization,
        dtype=dtype,
        scaling=conversion.adapter.scaling,
        files=written.files,
        bytes=written.num_bytes,
        tensors=dict(Counter(written.kinds.values())),
        updates=written.updates,
        kept=written.kept,
        proof=result.proof,
        from_training=result.from_training,
        losses=result.losses,
        warnings=rounding_warnings(written.updates, dtype),
        versions={"qvtune": qvtune.__version__} | {name: importlib.metadata.version(name) for name in _VERSIONS},
        seconds=seconds,
    )


def _require_proved(report: "MergeReport", output: Path) -> None:
    """Show the report. Raises ProofError."""
    from qvtune.convert.report import show

    show(report, output)
    if not report.proof.passed:
        raise ProofError(f"{output} was not written: the merged model is not base + adapter, see the table")


def _require_readable(reader: ReaderName, conversion: Conversion, chosen: OutputFormat) -> None:
    """Raises UserError, before anything is written, for what the reader cannot load or be compared by."""
    from qvtune.convert.readers.check import require_readable

    require_readable(reader, conversion)
    chosen.arguments(reader, conversion, "")


def _check(
    reader: ReaderName, conversion: Conversion, layered: "LayeredModel", chosen: OutputFormat, folder: Path
) -> "ReaderCheck":
    from qvtune.convert.readers.check import check

    arguments = chosen.arguments(reader, conversion, str(folder.resolve()))
    return check(reader, arguments, conversion, layered, chosen.views(conversion, folder).merged)


def _finish(report: "MergeReport", conversion: Conversion, chosen: OutputFormat, folder: Path, output: Path) -> None:
    """Write the report and the model card."""
    from qvtune.convert.card import model_card

    write_json(folder / "merge_report.json", asdict(report))
    how_to = {
        "load": chosen.how_to_load(conversion, output.name),
        "serve": chosen.how_to_serve(conversion, output.name),
    }
    card = model_card(report, conversion, output.name, how_to)
    (folder / "README.md").write_text(card, encoding="utf-8")
