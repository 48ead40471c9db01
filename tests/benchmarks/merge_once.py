"""One merge of the benchmark: python -m tests.benchmarks.merge_once {peft,original,dequantized,...} RUN OUTPUT RESULT

Writes RESULT, a JSON file with the seconds after all imports, and the peak memory of the process.
"""

import json
import os
import sys
import time
from pathlib import Path

from qvtune.system import peak_rss_bytes


def peft(run: Path, output: Path) -> float:
    """What everybody does today."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.monotonic()
    checkpoint = run / "checkpoints" / "latest"
    base = json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
    merged.save_pretrained(output)
    AutoTokenizer.from_pretrained(base).save_pretrained(output)
    return started


def ours(choice: str, run: Path, output: Path) -> float:
    """This project's merge without its proof."""
    from qvtune.config.outputs import MERGED_SHARD_BYTES
    from qvtune.convert.conversion import open_conversion
    from qvtune.convert.merge.write import made_from, merged_config, write_weights
    from qvtune.convert.sources.source import open_source
    from qvtune.model.companions import copy_companions
    from qvtune.storage.files import write_json
    from qvtune.storage.partial import partial_output

    if choice == "dequantized":
        import qvtune.model.loader  # noqa: F401  # what the merge would import on its way
    started = time.monotonic()
    conversion = open_conversion(open_source(run), choice, "bfloat16")  # type: ignore[arg-type]
    with partial_output(output, made_from(conversion, MERGED_SHARD_BYTES)) as partial:
        write_weights(partial, conversion, MERGED_SHARD_BYTES, len(os.sched_getaffinity(0)))
        copy_companions(conversion.base.folder, partial.folder)
        write_json(partial.folder / "config.json", merged_config(conversion))
    return started


def proved(choice: str, run: Path, output: Path) -> float:
    """The whole command; its imports happen on the way and are counted."""
    from qvtune.convert.convert import convert

    started = time.monotonic()
    convert(run, output, base_weights=choice, dtype="bfloat16")  # type: ignore[arg-type]
    return started


def main() -> None:
    """Merge and note what it has cost."""
    way, run, output, result = sys.argv[1], *map(Path, sys.argv[2:5])
    choice, _, with_proof = way.partition("+")
    started = peft(run, output) if way == "peft" else (proved if with_proof else ours)(choice, run, output)
    costs = {"seconds": time.monotonic() - started, "peak_bytes": peak_rss_bytes()}
    result.write_text(json.dumps(costs))


if __name__ == "__main__":
    main()
