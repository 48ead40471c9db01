"""``merged``: an ordinary Hugging Face folder with the weights in the dtype that was chosen."""

from pathlib import Path

import torch

from qvtune.convert.conversion import BaseChoice, Task
from qvtune.convert.merge.write import Written, merged_config, write_weights
from qvtune.convert.proof.proof import EXACT, ROUNDED, Limits
from qvtune.convert.proof.views import Sides, merged_folder, sides_of
from qvtune.model.companions import copy_companions
from qvtune.storage.files import write_json
from qvtune.storage.partial import PartialOutput

PREFERS: BaseChoice | None = None


def require(task: Task) -> None:
    """Whatever can be merged."""


def write(partial: PartialOutput, task: Task, max_shard_bytes: int, num_threads: int) -> Written:
    """As ``OutputFormat``."""
    written = write_weights(partial, task, max_shard_bytes, num_threads)
    copy_companions(task.base.folder, partial.folder)
    write_json(partial.folder / "config.json", merged_config(task))
    return written


def sides(task: Task, folder: Path) -> Sides:
    """As ``OutputFormat``."""
    return sides_of(task, merged_folder(folder))


def limits(task: Task) -> Limits:
    """Exact where neither the merge nor training has rounded any weight to 16 bits."""
    trained = task.adapter.dtype
    as_stored = all(torch.promote_types(tensor.dtype, trained) == trained for tensor in task.base.weights.values())
    return EXACT if as_stored and task.dtype == torch.float32 else ROUNDED


def how_to_load(task: Task, title: str) -> str:
    """As ``OutputFormat``."""
    return (
        f"```python\nfrom transformers import {task.auto_class}, AutoTokenizer\n\n"
        f'model = {task.auto_class}.from_pretrained("{title}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")\n```'
    )
