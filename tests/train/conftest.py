"""The module that is trained, around a tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qvtune.config.schema import AdapterSection, ModelSection
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.loader import load_whole
from qvtune.tasks.causal_lm import CausalLMObjective


@pytest.fixture(scope="session")
def make_objective(llama_fp32_folder: Path) -> Callable[..., CausalLMObjective]:
    def make(folder: Path = llama_fp32_folder, attention: str = "sdpa", **model: Any) -> CausalLMObjective:
        """In float32, with adapters whose B is not 0, as it would be after some steps. The same at every call."""
        base = load_whole(folder, ModelSection(**model), torch.float32, attention)
        adapted = add_adapters(base, AdapterSection(rank=4), str(folder), seed=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for name, parameter in trainable(adapted):
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.2)
        return CausalLMObjective(adapted)

    return make
