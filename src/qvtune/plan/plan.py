"""What a run will need and take on rented GPUs, before any is rented."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qvtune.config.deepspeed import AUTO, resolve_deepspeed
from qvtune.config.schema import RunConfig
from qvtune.console import console
from qvtune.errors import UserError, naming_setting
from qvtune.model.attention import choose_dtype
from qvtune.model.skeleton import read_model_config
from qvtune.model.source import cached_model_folder, is_hub_id
from qvtune.plan.advice import Advice, advise
from qvtune.plan.amount import Amount, amount_of
from qvtune.plan.flash import FLASH, register_flash
from qvtune.plan.gpus import GPUS
from qvtune.plan.memory import Costs, costs_of
from qvtune.plan.report import Estimate, memory_table, short_lines, time_lines
from qvtune.plan.simulate import Setup, adapted_model, model_of
from qvtune.plan.step_time import Cluster, gathers_of, step_time
from qvtune.storage.paths import cache_dir
from qvtune.tasks import get_task
from qvtune.train.step_memory import Gpus, step_memory


@dataclass(frozen=True)
class Request:
    """A cluster. ``gpu``: a name of ``GPUS``; ``nics_per_node`` None: one per GPU; ``tokens``: of the training data."""

    nodes: int
    gpus_per_node: int
    gpu: str
    nics_per_node: int | None = None
    tokens: int | None = None

    def cluster(self) -> Cluster:
        """As the estimates take it."""
        return Cluster(GPUS[self.gpu], self.nodes, self.gpus_per_node, self.nics_per_node or self.gpus_per_node)


def plan(run: RunConfig, request: Request, command: Sequence[str]) -> None:
    """Print memory, gathers, time and advice. ``command``: recipe and settings, as they were typed.

    Raises UserError for a run that cannot be planned, with the reason.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says on standard output that it found no GPU
    cluster, out = request.cluster(), console()
    estimate = estimate_of(run, request)
    out.print(memory_table(estimate, cluster))
    for line in time_lines(estimate, cluster):
        out.print(line, markup=False, soft_wrap=True)
    advice = advise(estimate.setup, estimate.costs, cluster)
    for line in _advice_lines(advice, estimate.setup.run, request, command):
        out.print(line, markup=False, soft_wrap=True)


def short_plan(run: RunConfig, request: Request) -> list[str]:
    """Memory, time and gathers in three lines; before them what ``deepspeed: auto`` means. UserError as ``plan``."""
    return short_lines(estimate_of(run, request), request.cluster())


def estimate_of(run: RunConfig, request: Request) -> Estimate:
    """A run as it is configured, on a cluster. Raises UserError as ``plan``."""
    cluster = request.cluster()
    setup, choice = setup_of(run, cluster)
    costs = costs_of(setup, cluster.num_gpus)
    return estimate_from(setup, costs, cluster, amount_of(run, config_folder(run), request.tokens), choice)


def estimate_from(setup: Setup, costs: Costs, cluster: Cluster, amount: Amount, choice: str | None = None) -> Estimate:
    """``costs`` of ``setup`` on as many ranks as ``cluster`` has GPUs; ``choice``: why ``deepspeed: auto`` is this."""
    micro_batches = setup.deepspeed_config["gradient_accumulation_steps"]
    sharded = setup.deepspeed_config["zero_optimization"]["stage"] == 3
    return Estimate(
        setup=setup,
        costs=costs,
        gathers=gathers_of(costs, cluster, micro_batches),
        time=step_time(costs, cluster, micro_batches, sharded=sharded),
        amount=amount,
        choice=choice,
    )


def setup_of(run: RunConfig, cluster: Cluster) -> tuple[Setup, str | None]:
    """What is simulated, and why ``deepspeed: auto`` is what it is there. Raises UserError as ``plan``."""
    dtype, _ = choose_dtype(run.model.dtype, on_gpus=True)
    folder = config_folder(run)
    with naming_setting("model.name_or_path"):
        model_config = read_model_config(folder, run.model)
    if problems := get_task(run.task, run.classification).model_problems(model_config, run.data.max_length):
        raise UserError(problems)
    register_flash()
    attention = run.model.attention if run.model.attention in ("sdpa", "eager") else FLASH
    setup, choice = Setup(run, model_config, {}, dtype, attention, device="cuda"), None
    if run.deepspeed == AUTO:
        memory = step_memory(run, adapted_model(model_of(setup)[0], run), model_config, dtype)
        file, choice = memory.choose(Gpus(cluster.gpu.memory, cluster.gpus_per_node, cluster.nodes))
        run = run.model_copy(update={"deepspeed": file})
    name = str(dtype).removeprefix("torch.")
    deepspeed_config = resolve_deepspeed(run, cluster.num_gpus, name, cluster.gpus_per_node)
    return replace(setup, run=run, deepspeed_config=deepspeed_config), choice


def config_folder(run: RunConfig) -> Path:
    """Where the base's config.json is; nothing else of it is needed."""
    name = run.model.name_or_path
    with naming_setting("model.name_or_path"):
        folder = cached_model_folder(name, cache_dir(), run.model.revision)
        if folder is None:
            fetch = f"`hf download {name} config.json`" if is_hub_id(name) else "`make demo` once"
            raise UserError(
                f"{name!r} is not on this machine; only its config.json is needed: {fetch}, or give a folder with it"
            )
    return folder


def _advice_lines(advice: Advice | None, run: RunConfig, request: Request, command: Sequence[str]) -> list[str]:
    if advice is None:
        return [
            f"Advice   nothing fits on {request.nodes} x {request.gpus_per_node} {request.gpu}: more GPUs, a smaller "
            "data.max_length, or zero3_offload.json (base in host memory; not planned here)"
        ]
    checkpointing = "with" if advice.checkpointing else "without"
    overrides = advice.overrides(run)
    lines = [
        f"Advice   {advice.stage}, train.micro_batch_size={advice.micro_batch_size}, {checkpointing} activation "
        f"checkpointing: {advice.seconds:.3g} s a step" + ("" if overrides else ", as configured"),
        f"         {advice.reason}",
    ]
    return [*lines, f"Command  {_command(request, [*command, *overrides])}"]


def _command(request: Request, arguments: Sequence[str]) -> str:
    recipe = ["--config", *arguments]
    if request.nodes == 1:
        return shlex.join(["deepspeed", "--num_gpus", str(request.gpus_per_node), "launch/train.py", *recipe])
    cluster = ["--nodes", str(request.nodes), "--gpus-per-node", str(request.gpus_per_node)]
    return shlex.join(["python", "launch/submit.py", *cluster, *recipe])
