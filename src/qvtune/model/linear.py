"""Products with matrices that are not trained: torch's own, on a CPU in float32 those of oneDNN.

For float32 on an x86 CPU torch calls MKL, which runs its AVX2 code on processors of other makers than Intel. oneDNN,
which torch comes with and takes for bfloat16, has AVX-512 code for all of them. python -m tests.benchmarks.linear
measures both.
"""

import torch
from torch import nn


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + b``, [..., in] -> [..., out], as ``nn.functional.linear`` but outside of autograd.

    Sums in another order than torch's own for float32 on a CPU, so the last bits differ.
    """
    on_cpu = inputs.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and inputs.dtype == torch.float32:
        # What torch's compiler calls for a linear layer: no other function of torch computes float32 with oneDNN.
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
        return product
    return nn.functional.linear(inputs, weight, bias)
