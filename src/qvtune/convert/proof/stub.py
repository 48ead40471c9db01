"""The stub that takes the place of a layer while a model's own forward runs, and the texts that go through it.

Shape suffixes: N texts of a batch, T positions, D hidden size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Batch:
    """Texts on their way through one model: hidden states, and the other arguments of each layer's call."""

    embeddings_NTD: torch.Tensor
    hidden_NTD: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    finished: bool = False


class LayerStub(nn.Module):
    """Replaces a layer: records its calls, or returns the output of the last layer. Its attributes are the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: not a submodule
        self.batch: Batch | None = None
        self.returns_tuple = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)

    def forward(self, hidden_NTD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hidden states, in a tuple where the layer returns one."""
        assert self.batch is not None
        if not self.batch.finished:
            if self.batch.arguments and hidden_NTD is not self.batch.hidden_NTD:
                raise OtherHiddenStatesError
            self.batch.hidden_NTD = hidden_NTD
            self.batch.arguments.append((args, kwargs))
        return (self.batch.hidden_NTD,) if self.returns_tuple else self.batch.hidden_NTD


class OtherHiddenStatesError(Exception):
    """A layer is called with something else than what the stub before it has returned."""
