"""Linear layers that are not trained.

Autograd keeps the module and not its matrix: what forward has seen is freed by ZeRO-3 and gathered again for backward.
``nn.functional.linear`` would keep the gathered matrices of all layers, which are the whole base, until backward.
"""

from typing import Any

import torch
from torch import nn

ROWS = 32  # oneDNN gets multiples of it: for each number of rows it compiles code that stays, up to 0.5 MiB


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + b``, [..., in] -> [..., out], as ``nn.functional.linear`` but outside of autograd.

    For float32 on an x86 CPU torch calls MKL, which runs its AVX2 code on processors of other makers than Intel. Its
    other library, oneDNN, has AVX-512 code for all of them; its sums have another order, so the last bits differ.
    ``python -m tests.benchmarks.linear`` measures both.
    """
    rows = inputs.shape[:-1].numel()
    on_cpu = inputs.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not on_cpu or inputs.dtype != torch.float32 or rows < ROWS:
        return nn.functional.linear(inputs, weight, bias)
    inputs_2d = inputs.flatten(0, -2)
    if rows % ROWS:
        inputs_2d = nn.functional.pad(inputs_2d, (0, 0, 0, -rows % ROWS))
    # What torch's compiler calls for a linear layer: no other function of torch computes float32 with oneDNN.
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs_2d, weight, bias, "none", [], "")
    return product[:rows].view(*inputs.shape[:-1], -1)


class FrozenLinear(nn.Linear):
    """``y = x W^T + b`` with a W that is not trained; b may be."""

    def matrix(self) -> torch.Tensor:
        """W as it is at this moment, [out_features, in_features]."""
        return self.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        output: torch.Tensor = _Product.apply(hidden_states, self)  # type: ignore[no-untyped-call]
        return output + self.bias if self._has_trained_bias else output

    @property
    def _has_trained_bias(self) -> bool:
        return self.bias is not None and self.bias.requires_grad


class _Product(torch.autograd.Function):
    """With the bias, unless that is trained."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, module: FrozenLinear) -> torch.Tensor:
        ctx.module = module
        bias = None if module._has_trained_bias else module.bias
        return linear(hidden_states, module.matrix(), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return linear(grad_outputs[0], ctx.module.matrix().T), None
