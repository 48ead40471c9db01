"""How far each projection of each layer has been moved by its low-rank factors."""

import math

from qvtune.checkpoint.state import TrainedState
from qvtune.config.adapter import AdapterSection, lora_scale
from qvtune.model.adapters import group_and_factor


def update_norms(state: TrainedState, adapter: AdapterSection) -> dict[str, list[float]]:
    """Projection -> Frobenius norm of scale * B A for each layer, in the model's order; empty without factors.

    From rank-by-rank matrices: the squared norm of B A is the sum of (B^T B) * (A A^T). Of DoRA it is the update before
    the columns get their trained norms.
    """
    if not adapter.has_factors:
        return {}
    scale = lora_scale(adapter.alpha, adapter.rank, is_rslora=adapter.method == "rslora")
    factors: dict[str, dict[str, dict[str, str]]] = {}  # projection -> path of the module -> A or B -> name
    for name in state:
        path, _, rest = name.rpartition(".lora_")
        if rest.startswith(("A.", "B.")):
            projection, _ = group_and_factor(name)
            factors.setdefault(projection, {}).setdefault(path, {})[rest[0]] = name
    return {
        projection: [scale * _norm(state, one["A"], one["B"]) for one in modules.values()]
        for projection, modules in factors.items()
    }


def _norm(state: TrainedState, name_a: str, name_b: str) -> float:
    a, b = state[name_a]["value"].double(), state[name_b]["value"].double()  # [rank, inputs], [outputs, rank]
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))
