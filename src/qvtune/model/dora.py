"""DoRA (arXiv 2402.09353) beside a base whose matrices are sharded by ZeRO-3 or stored in 4 bits.

PEFT's own layer reads the base's matrix W in its forward, where ZeRO-3 has released it and NF4 has only codes of it.
This one computes the same from what the base layer gives, with one gather and one dequantization of W.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn

from qvtune.errors import UserError
from qvtune.model.linear import FrozenLinear
from qvtune.model.shard import gathered


class DoraLinear(lora.Linear):
    """``y = m / ||W + s B A|| * (W + s B A) x + b``, norms by output: PEFT's linear layer with DoRA, under its names.

    No gradient flows through the norm, as in section 4.3 of the paper. With dropout the base's output stays as it is,
    and what is added is that of the inputs after dropout, as in PEFT. Shapes: x [..., in], A [rank, in], B [out, rank],
    magnitude m [out], which starts at ``||W||``.
    """

    weight_norm: torch.Tensor

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **options)
        norm = weight_norm(base_layer)
        magnitude = DoraLinearLayer(fan_in_fan_out=False)  # type: ignore[no-untyped-call]
        magnitude.weight = nn.Parameter(norm.to(next(self.lora_A.parameters()).dtype, copy=True))
        self.lora_magnitude_vector[adapter_name] = magnitude
        self.register_buffer("weight_norm", norm, persistent=False)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """None: this class is the variant."""
        return {("use_dora",): None}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        (name,) = self.active_adapters
        dropped, scaling = self.lora_dropout[name](x), self.scaling[name]
        parts: tuple[Any, ...] = self.lora_A[name], self.lora_B[name], self.lora_magnitude_vector[name]
        factor_a, factor_b, magnitude = (part.weight for part in parts)
        # The rows of A and a row of zeros go through the base layer too: they give W A^T and the bias.
        inputs = [x.flatten(0, -2), factor_a.detach(), x.new_zeros(1, x.shape[-1])]
        if dropped is not x:
            inputs.insert(0, dropped.flatten(0, -2))
        *outputs, of_a, bias = self.base_layer(torch.cat(inputs)).split([len(one) for one in inputs])
        of_a, bias = of_a.detach(), bias.detach()
        of_dropped = outputs[0] - bias
        rest = bias if dropped is x else outputs[1] - of_dropped

        update = nn.functional.linear(nn.functional.linear(dropped.flatten(0, -2), factor_a), factor_b)
        scale = magnitude / self._norm((of_a - bias).T, factor_a, factor_b, scaling)
        result = (scale * (of_dropped + scaling * update)).to(x.dtype) + rest
        output: torch.Tensor = result.view(*x.shape[:-1], -1)
        return output

    @torch.no_grad()
    def _norm(self, w_a: torch.Tensor, factor_a: torch.Tensor, factor_b: torch.Tensor, scaling: float) -> torch.Tensor:
        """``||W + s B A||`` by output, fp32 [out], from ``W A^T`` [out, rank]:
        ``||W||^2 + 2 s <W A^T, B> + s^2 ||B A||^2``."""
        a, b = factor_a.float(), factor_b.float()
        changed = 2 * scaling * (w_a.float() * b).sum(1) + scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
        norm: torch.Tensor = (self.weight_norm.square() + changed).sqrt()
        return norm


def weight_norm(layer: nn.Linear) -> torch.Tensor:
    """L2 norm of each row of the layer's matrix, fp32 [out]; ones for a layer without memory. Collective under ZeRO-3,
    which gathers this layer alone.

    Raises UserError where a row is zero: DoRA divides by its norm.
    """
    if layer.weight.is_meta:
        return torch.ones(layer.out_features)
    with gathered(layer.parameters()), torch.no_grad():
        weight = layer.matrix() if isinstance(layer, FrozenLinear) else layer.weight
        norm: torch.Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    if not norm.all():
        raise UserError(
            f"adapter.method: dora divides by the norms of a matrix's rows, and row {int(norm.argmin())} of a trained "
            f"{list(weight.shape)} matrix of the base is zero; choose method: lora"
        )
    return norm
