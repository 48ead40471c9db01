"""Memory of one rank by cause, gathers and operations of a micro-batch: two shallow simulations, extrapolated."""

import copy
from collections import Counter
from dataclasses import dataclass, replace
from typing import TypeVar

from qvtune.model.whole import cache_bytes
from qvtune.plan.simulate import BASE, CACHE, GATHERED, TRAINED, Setup, simulate
from qvtune.plan.tracker import Bytes

_DEPTHS = (3, 4)  # layers; with three there is a first, a last and another one
GENERATION = "generation"  # the phase of train.generate
Key = TypeVar("Key")


@dataclass(frozen=True)
class Costs:
    """Of one rank and micro-batch.

    Attributes:
        peaks: phase -> bytes by cause at the moment of the phase that needs most.
        persistent: bytes of small parameters that stay gathered, part of what is gathered in ``peaks``.
        gathered, gathered_in_node: bytes that all-gathers of all ranks, and those within a node (hpZ), put on this
            rank, its own part included.
        operations: (FLOP, bytes read and written) -> number of operations.
        num_layers: decoder layers.
    """

    peaks: dict[str, Bytes]
    persistent: int
    gathered: int
    gathered_in_node: int
    operations: Counter[tuple[int, int]]
    num_layers: int

    @property
    def peak(self) -> Bytes:
        """Bytes by cause at the moment that needs most."""
        return max(self.peaks.values(), key=Counter.total)


def costs_of(setup: Setup, num_ranks: int) -> Costs:
    """Costs of a run on ``num_ranks``. Exact where all layers have the shapes of the first ones."""
    num_layers = setup.model_config.num_hidden_layers
    if num_layers <= _DEPTHS[1]:
        return _costs(setup, num_ranks)
    shallow, deep = (_costs(_cut(setup, depth), num_ranks) for depth in _DEPTHS)

    layers = num_layers - _DEPTHS[0]

    def extrapolated(few: Counter[Key], more: Counter[Key]) -> Counter[Key]:
        return Counter({key: few[key] + layers * (more[key] - few[key]) for key in few | more})

    return Costs(
        peaks={phase: extrapolated(peak, deep.peaks[phase]) for phase, peak in shallow.peaks.items()},
        persistent=shallow.persistent + layers * (deep.persistent - shallow.persistent),
        gathered=shallow.gathered + layers * (deep.gathered - shallow.gathered),
        gathered_in_node=shallow.gathered_in_node + layers * (deep.gathered_in_node - shallow.gathered_in_node),
        operations=extrapolated(shallow.operations, deep.operations),
        num_layers=num_layers,
    )


def _cut(setup: Setup, num_layers: int) -> Setup:
    """The same with the first layers alone."""
    config = copy.deepcopy(setup.model_config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    return replace(setup, model_config=config)


def _costs(setup: Setup, num_ranks: int) -> Costs:
    """As simulated with few ranks: what is gathered does not depend on their number; what is sharded is corrected.

    DeepSpeed handles the parts of a gathered parameter one by one, which takes minutes for a thousand of them.
    """
    zero = setup.deepspeed_config["zero_optimization"]
    node = min(zero.get("zero_hpz_partition_size", 1), num_ranks)  # ranks that hold a second copy together (hpZ)
    few_in_node = min(node, 2)
    few = num_ranks if zero["stage"] == 2 else few_in_node * min(num_ranks // node, 2)
    few_setup = setup if node == 1 else _with_hpz(setup, few_in_node)
    simulated = simulate(few_setup, few)
    static = simulated.static
    if (few, few_in_node) != (num_ranks, node):
        static = simulate(setup, num_ranks, micro_batches=0).static

    def corrected(peak: Bytes) -> Bytes:
        second_copy = peak[BASE] - simulated.static[BASE]
        return Counter(peak) + Counter(  # AdamW's moments are in `static` only
            {
                BASE: static[BASE] + second_copy * few_in_node // node - peak[BASE],
                TRAINED: static[TRAINED] - peak[TRAINED],
            }
        )

    peaks = {phase: corrected(peak) for phase, peak in simulated.tracked.peaks.items()}
    if setup.run.train.generate is not None:
        gathered = few * simulated.static[BASE] if zero["stage"] == 3 else 0
        peaks[GENERATION] = Counter(
            {BASE: static[BASE], TRAINED: static[TRAINED], GATHERED: gathered, CACHE: _cache_bytes(setup)}
        )
    tracked = simulated.tracked
    in_node = tracked.gathered[few_in_node] if node > 1 else 0
    return Costs(
        peaks=peaks,
        persistent=simulated.persistent,
        gathered=tracked.gathered.total() - in_node,
        gathered_in_node=in_node,
        operations=tracked.operations,
        num_layers=setup.model_config.num_hidden_layers,
    )


def _cache_bytes(setup: Setup) -> int:
    """Keys and values of the prompts that a rank answers at a time, which are taken to have ``data.max_length``."""
    settings = setup.run.train.generate
    assert settings is not None
    tokens = settings.batch_size * (setup.run.data.max_length + settings.max_new_tokens)
    return cache_bytes(setup.model_config, tokens, setup.dtype)


def _with_hpz(setup: Setup, ranks: int) -> Setup:
    config = setup.deepspeed_config
    zero = config["zero_optimization"] | {"zero_hpz_partition_size": ranks}
    return replace(setup, deepspeed_config=config | {"zero_optimization": zero})
