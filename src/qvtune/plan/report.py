"""An estimate as text."""

from dataclasses import dataclass, replace

from rich.table import Table

from qvtune.config.zero_stage import GIB, RESERVED, USABLE, usable_bytes
from qvtune.plan.amount import Amount
from qvtune.plan.gpus import GB
from qvtune.plan.memory import Costs
from qvtune.plan.simulate import BASE, CACHE, GATHERED, HEAD, LAYER, SAVED, TRAINED, Setup
from qvtune.plan.step_time import Cluster, Gathers, StepTime, gathers_of

_CAUSES = {
    BASE: "frozen base: this rank's part (zero2: all of it; hpZ: two parts)",
    TRAINED: "adapters, gradients, float32 masters, moments, buffers",
    GATHERED: "gathered for the layers at work, or for a generation",
    SAVED: "activations kept for backward",
    HEAD: "logits of a chunk",
    LAYER: "the layer at work: recomputed activations, gradients",
    CACHE: "keys and values of answers (train.generate)",
}


@dataclass(frozen=True)
class Estimate:
    """What is known of a run on a cluster."""

    setup: Setup
    costs: Costs
    gathers: Gathers
    time: StepTime
    amount: Amount
    choice: str | None = None  # why `deepspeed: auto` is what it is here

    @property
    def tensor_bytes(self) -> int:
        """Of one GPU, at the moment that needs most."""
        return self.costs.peak.total()


def verdict(tensor_bytes: int, gpu_bytes: int) -> str:
    """Whether it fits, also when the allocator leaves holes."""
    if tensor_bytes <= usable_bytes(gpu_bytes):
        return "fits"
    return "may fit, with no room for holes" if tensor_bytes <= gpu_bytes - RESERVED else "does not fit"


def memory_table(estimate: Estimate, cluster: Cluster) -> Table:
    """Memory of one GPU by cause, at the moment that needs most."""
    table = Table("memory of a GPU at its peak", "GiB")
    table.columns[1].justify = "right"
    peak, persistent = estimate.costs.peak.copy(), estimate.costs.persistent
    if persistent:
        peak[GATHERED] -= persistent
        table.add_row("small parameters that stay gathered", _gib(persistent))
    for cause, what in _CAUSES.items():
        if peak[cause]:
            table.add_row(what, _gib(peak[cause]))
    table.add_row("all tensors", _gib(estimate.tensor_bytes), end_section=True)
    table.add_row("CUDA context, NCCL, libraries (assumed)", _gib(RESERVED))
    table.add_row(f"holes of the allocator (assumed: {1 / USABLE - 1:.0%})", _gib(_holes(estimate.tensor_bytes)))
    table.add_row("total", _gib(_total(estimate.tensor_bytes)), end_section=True)
    table.add_row(f"the GPU: {verdict(estimate.tensor_bytes, cluster.gpu.memory)}", _gib(cluster.gpu.memory))
    return table


def time_lines(estimate: Estimate, cluster: Cluster) -> list[str]:
    """Gathers, seconds of a step, tokens per second, hours of the run."""
    time, amount = estimate.time, estimate.amount
    low, high = (amount.tokens_per_step / seconds for seconds in (time.high, time.low))
    lines = [
        *([f"Stage    {estimate.choice}"] if estimate.choice is not None else []),
        *_gather_lines(estimate, cluster),
        f"Step     {_seconds(time.low)} to {_seconds(time.high)}, expected {_seconds(time.expected)}; never less than "
        f"{_seconds(time.bound)}; Python alone up to {_seconds(time.host)} on a slow host",
        f"Speed    {low:,.0f} to {high:,.0f} tokens/s, {low / cluster.num_gpus:,.0f} to {high / cluster.num_gpus:,.0f} "
        f"a GPU; a step has {amount.tokens_per_step:,.0f} tokens",
    ]
    if amount.steps is None:
        lines.append(f"Run      unknown length: {amount.source}")
    else:
        hours = [amount.steps * seconds / 3600 for seconds in (time.low, time.high)]
        lines.append(f"Run      {amount.steps:,} steps ({amount.source}): {hours[0]:.1f} to {hours[1]:.1f} hours")
    lines.append(
        "Basis    shapes of the model, DeepSpeed's own allocations, data sheets. Nothing of it was measured on a GPU; "
        "where the host runs ahead of the GPU, ZeRO-3 holds up to two gathered layers more than are counted here."
    )
    return lines


def short_lines(estimate: Estimate, cluster: Cluster) -> list[str]:
    """The same in three lines, after one on what ``deepspeed: auto`` is here."""
    time, tokens, gpu_bytes = estimate.time, estimate.tensor_bytes, cluster.gpu.memory
    parts = ", ".join(f"{cause} {_gib(size)}" for cause, size in estimate.costs.peak.most_common() if size > GIB / 20)
    return [
        *([estimate.choice] if estimate.choice is not None else []),
        f"{_gib(_total(tokens))} of {_gib(gpu_bytes)} GiB per GPU ({verdict(tokens, gpu_bytes)}): {parts}",
        f"a step {_seconds(time.low)} to {_seconds(time.high)}, never less than {_seconds(time.bound)}",
        *(line.removeprefix("Gathers  ") for line in _gather_lines(estimate, cluster)),
    ]


def _gather_lines(estimate: Estimate, cluster: Cluster) -> list[str]:
    gathers, costs = estimate.gathers, estimate.costs
    if not gathers.num_bytes:
        return ["Gathers  none: the base is whole on every GPU"]
    total, in_node = gathers.num_bytes / GB, _seconds(gathers.in_node_seconds)
    line = f"Gathers  {total:,.1f} GB into each GPU a step: {in_node} in the node"
    if not gathers.between_nodes_seconds:
        return [f"{line}, nothing between nodes" if cluster.nodes > 1 else line]
    micro_batches = estimate.setup.deepspeed_config["gradient_accumulation_steps"]
    one = gathers_of(costs, replace(cluster, nics_per_node=1), micro_batches).between_nodes_seconds
    return [
        f"{line}, {_seconds(gathers.between_nodes_seconds)} between nodes over {cluster.nics_per_node} adapters of "
        f"{cluster.gpu.nic * 8:.0f} Gbit/s a node ({_seconds(one)} over one)"
    ]


def _holes(tensor_bytes: int) -> int:
    return int(tensor_bytes / USABLE) - tensor_bytes


def _total(tensor_bytes: int) -> int:
    return tensor_bytes + _holes(tensor_bytes) + RESERVED


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:,.0f} s"
