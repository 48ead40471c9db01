"""``merged``: an ordinary Hugging Face folder with the weights in the dtype that was chosen."""

from pathlib import Path
from typing import Any

import torch

from qvtune.config.outputs import BaseChoice, ReaderName
from qvtune.convert.conversion import Conversion
from qvtune.convert.merge.write import Written, merged_config, write_weights
from qvtune.convert.proof.proof import EXACT, EXACT_SCORES, ROUNDED, ROUNDED_SCORES, Limits
from qvtune.convert.proof.views import ModelViews, merged_folder, model_views
from qvtune.convert.serving import python_code, vllm_options, vllm_serve, write_companions
from qvtune.storage.files import write_json
from qvtune.storage.partial import PartialOutput

PREFERS: BaseChoice | None = None


def require(conversion: Conversion) -> None:
    """Whatever can be merged."""


def write(partial: PartialOutput, conversion: Conversion, max_shard_bytes: int, num_threads: int) -> Written:
    """As ``OutputFormat``."""
    written = write_weights(partial, conversion, max_shard_bytes, num_threads)
    write_companions(conversion, partial.folder)
    write_json(partial.folder / "config.json", merged_config(conversion))
    return written


def views(conversion: Conversion, folder: Path) -> ModelViews:
    """As ``OutputFormat``."""
    return model_views(conversion, merged_folder(folder))


def limits(conversion: Conversion) -> Limits:
    """Exact where neither the merge nor training has rounded any weight to 16 bits."""
    trained = conversion.adapter.dtype
    as_stored = all(
        torch.promote_types(tensor.dtype, trained) == trained for tensor in conversion.base.weights.values()
    )
    is_exact = as_stored and conversion.dtype == torch.float32
    if conversion.settings.get("problem_type") == "regression":
        return EXACT_SCORES if is_exact else ROUNDED_SCORES
    return EXACT if is_exact else ROUNDED


def how_to_load(conversion: Conversion, title: str) -> str:
    """As ``OutputFormat``."""
    return (
        f"```python\nfrom transformers import {conversion.auto_class}, AutoTokenizer\n\n"
        f'model = {conversion.auto_class}.from_pretrained("{title}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")\n```'
    )


def how_to_serve(conversion: Conversion, title: str) -> str:
    """As ``OutputFormat``."""
    if conversion.is_classifier:
        return "A classifier is loaded with transformers, as above."
    return vllm_serve(vllm_options(conversion, title))


def arguments(reader: ReaderName, conversion: Conversion, folder: str) -> dict[str, Any]:
    """As ``OutputFormat``."""
    if reader == "vllm":
        return {"options": vllm_options(conversion, folder), "adapter": None}
    return {"code": python_code(how_to_load(conversion, folder))}
