"""Adapters made with PEFT itself, and what PEFT and we make of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from qvtune.convert.conversion import open_conversion
from qvtune.convert.sources.source import open_source

Tensors = dict[str, torch.Tensor]


def save_adapter(
    base: Path, folder: Path, architecture: Any, *, edit: Callable[[Any], object] = lambda model: None, **settings: Any
) -> Path:
    """A PEFT adapter of ``base`` in which every trained value is random, saved by PEFT. Returns ``folder``."""
    options = settings.pop("options", {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = get_peft_model(architecture.from_pretrained(base, **options), LoraConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
    edit(model)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path, architecture: Any, **options: Any) -> nn.Module:
    """PEFT's own merge."""
    model = PeftModel.from_pretrained(architecture.from_pretrained(base, **options), adapter)
    merged: nn.Module = model.merge_and_unload()
    return merged


def merged_by_us(adapter: Path, *, allow_pickle: bool = False, base: Path | None = None) -> tuple[Tensors, Any]:
    """Every tensor of the merged model in fp32, by its name in the base's files, and the adapter that made it."""
    source = open_source(adapter, base=str(base) if base else None, allow_pickle=allow_pickle)
    conversion = open_conversion(source, "original", "auto")
    ours, opened = conversion.adapter, conversion.base
    merged = {}
    for name in opened.tensors.keys() - ours.dropped:
        value = opened.weights.read(name).view(opened.tensors[name].shape)
        merged[name] = ours.changes[name].apply(value.float()) if name in ours.changes else value
    assert not ours.added.keys() & merged.keys()
    return merged | {name: tensor.float() for name, tensor in ours.added.items()}, ours


def assert_same(found: Tensors, expected: Tensors, tolerance: float = 1e-6) -> None:
    """Tensor by tensor: the same names, shapes, and values up to the order of additions."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].to(tensor.dtype),
            tensor,
            rtol=tolerance,
            atol=tolerance,
            msg=partial("{}: {}".format, name),
        )
