"""Input and output embeddings that are one tensor in the base: a change to one of them unties them.

In training the other one stays what it was (PEFT adapts or copies a module, never the tensor both share), so a merged
model that keeps them tied, as ``merge_and_unload`` makes it, is not the one that was trained.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qvtune.convert.merge.changes import Change, Replaced, RowsReplaced
from qvtune.convert.sources.peft_config import HEAD_TASKS
from qvtune.errors import UserError
from qvtune.storage.safetensors import BaseWeights, StoredTensor

OUTPUT = "lm_head.weight"
_INPUTS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def keep_or_untie(
    task: str | None,
    trained_tied: bool,
    changes: dict[str, Change],
    names: Mapping[str, str],
    base: Mapping[str, StoredTensor],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The output matrix to add where it has to be untied, and config.json's setting of that; else nothing.

    ``trained_tied``: PEFT's ensure_weight_tying. Takes what concerns a tied output matrix out of ``changes``.
    """
    source = input_of(names)
    if task in HEAD_TASKS or source is None or not _tied(base, names):
        return {}, {}
    to_input, to_output = changes.get(source), changes.get(OUTPUT)
    if to_input is None and to_output is None:
        return {}, {}
    if _stays_tied(to_input, to_output, trained_tied):
        changes.pop(OUTPUT, None)
        return {}, {}
    if trained_tied:
        raise UserError("ensure_weight_tying with LoRA on both embeddings cannot be merged; give them modules_to_save")
    settings = {"tie_word_embeddings": False}
    if OUTPUT in names:  # the file has a copy of its own
        return {}, settings
    weight = _read(base[names[source]])
    change = changes.pop(OUTPUT, None)
    return {OUTPUT: weight if change is None else change.apply(weight.float())}, settings


def input_of(names: Iterable[str]) -> str | None:
    """The name of the input embeddings."""
    return next((name for name in names if name.endswith(_INPUTS)), None)


def _tied(base: Mapping[str, StoredTensor], names: Mapping[str, str]) -> bool:
    folder = next(iter(base.values())).file.parent
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("tie_word_embeddings", OUTPUT not in names))


def _stays_tied(to_input: Change | None, to_output: Change | None, trained_tied: bool) -> bool:
    if isinstance(to_input, Replaced) and isinstance(to_output, Replaced):
        return torch.equal(to_input.tensor, to_output.tensor)
    if isinstance(to_input, RowsReplaced):  # PEFT lets both use the trained tokens
        return to_output is None
    return trained_tied and to_output is None


def _read(stored: StoredTensor) -> Tensor:
    if stored.file.suffix != ".safetensors":
        raise UserError(f"{stored.file}: the adapter unties the embeddings, for which the base must be in safetensors")
    weights = BaseWeights(stored.file.parent, {stored.name: stored})
    return weights.read_flat(stored.name).view(stored.shape)
