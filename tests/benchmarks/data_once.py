"""One way of the benchmark: python -m tests.benchmarks.data_once WAY TOKENIZER ROWS FOLDER RESULT PROCESSES

WAY is trl, ours, dense or again. Writes RESULT, a JSON file with what it has cost after all imports.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from qvtune.system import peak_rss_bytes

MAX_LENGTH = 2048
Costs = dict[str, float]


def trl(tokenizer: Any, rows: Path, folder: Path, num_processes: int) -> Costs:
    """What TRL's trainer does with a data set before its first step."""
    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    disable_caching()
    disable_progress_bars()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    settings = SFTConfig(
        output_dir=str(folder),
        max_length=MAX_LENGTH,
        packing=True,
        padding_free=False,
        report_to=[],
        use_cpu=True,
        bf16=False,
        dataset_num_proc=num_processes if num_processes > 1 else None,
    )
    started = Started()
    with rows.open(encoding="utf-8") as opened:
        data = Dataset.from_list([json.loads(line) for line in opened])
    trainer = SFTTrainer(model=model, processing_class=tokenizer, args=settings, train_dataset=data)
    costs = started.costs()
    num_tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    density = num_tokens / (len(trainer.train_dataset) * MAX_LENGTH)
    return costs | {"rows": len(data), "tokens": num_tokens, "density": density}


def ours(tokenizer: Any, rows: Path, folder: Path, num_processes: int) -> Costs:
    """This project's token cache, from nothing."""
    return made(builder(tokenizer, rows, folder, num_processes))


def dense(tokenizer: Any, rows: Path, folder: Path, num_processes: int) -> Costs:
    """The same with ``packing: dense``."""
    return made(builder(tokenizer, rows, folder, num_processes, packing="dense"))


def made(build: Any) -> Costs:
    """What it costs to make the rows."""
    started = Started()
    found = build().statistics
    costs = started.costs()
    return costs | {"rows": found["source_rows"], "tokens": found["tokens"], "density": found["packing_density"]}


def again(tokenizer: Any, rows: Path, folder: Path, num_processes: int) -> Costs:
    """A second start, and the rows of a step at nine tenths of an epoch, of which no earlier one was visited."""
    from qvtune.data.mixture import RowOrder

    build = builder(tokenizer, rows, folder, num_processes)
    started = Started()
    found = build()
    costs = {f"again_{name}": value for name, value in started.costs().items()}
    batch = 8
    started = Started()
    order = RowOrder([len(found)], None, seed=0)
    for row in order.of_step(len(found) * 9 // 10 // batch, batch).tolist():
        assert len(found[row].input_ids) == found.num_tokens[row]
    return costs | {"step_seconds": started.costs()["seconds"]}


def builder(tokenizer: Any, rows: Path, folder: Path, num_processes: int, packing: Any = True) -> Any:
    """Everything is imported."""
    from qvtune.config.data import DataSection
    from qvtune.data.dataset import build_token_rows
    from qvtune.tasks.causal_lm import TASK

    config = DataSection(train=str(rows), max_length=MAX_LENGTH, packing=packing, num_workers=num_processes)
    return lambda: build_token_rows(config.train_sources[0], config, tokenizer, TASK, folder / "tokens")


class Started:
    """From now on."""

    def __init__(self) -> None:
        self._seconds, self._cpu_seconds = time.monotonic(), _cpu_seconds()

    def costs(self) -> Costs:
        """Until now; ``fork_bytes``: of the largest process that was forked, pages that it shares included."""
        return {
            "seconds": time.monotonic() - self._seconds,
            "cpu_seconds": _cpu_seconds() - self._cpu_seconds,
            "peak_bytes": peak_rss_bytes(),
            "fork_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        }


def _cpu_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Measure one way."""
    from transformers import AutoTokenizer

    way, rows, folder, result = sys.argv[1], *map(Path, sys.argv[3:6])
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
    costs = {"trl": trl, "ours": ours, "dense": dense, "again": again}[way](tokenizer, rows, folder, int(sys.argv[6]))
    result.write_text(json.dumps(costs))


if __name__ == "__main__":
    main()
