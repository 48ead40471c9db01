"""Two micro-batches of training on tensors without memory: engine, model and loss of a run of any size.

Whatever decides what is allocated is the code that trains: the skeleton, the adapters, the objective, and DeepSpeed
with the configuration of the run, in a process group that pretends. Shapes are computed, values are not.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qvtune.config.deepspeed import fill_from_model
from qvtune.config.schema import RunConfig
from qvtune.data.batch import Batch
from qvtune.distributed.fake_ranks import fake_ranks
from qvtune.model import nf4
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.families import FAMILIES, trained_matrices
from qvtune.model.head import head_path
from qvtune.model.layers import decoder_layers, hook_layers, layer_sizes
from qvtune.model.shard import Placement, Whole, ZeroPartition, release_gathered
from qvtune.model.skeleton import freeze, plain_skeleton
from qvtune.optim.groups import parameter_groups
from qvtune.plan.tracker import Bytes, Tracked, Tracker
from qvtune.tasks import get_task, sequence_classification
from qvtune.tasks.causal_lm import MIN_CHUNK_ROWS, FrozenHeadLoss

# Causes of memory; SAVED is what forward keeps for backward, LAYER what backward allocates, CACHE what answers keep.
BASE, TRAINED, GATHERED, SAVED, HEAD, LAYER = "base", "trained", "gathered", "saved", "head", "layer"
CACHE = "cache"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """What a simulation needs to know of a run; ``model_config`` is the base's transformers configuration, ``device``
    ("cpu" or "cuda") where the run computes."""

    run: RunConfig
    model_config: Any
    deepspeed_config: dict[str, Any]
    dtype: torch.dtype
    attention: str
    device: str = "cpu"


@dataclass(frozen=True)
class Simulated:
    """Rank 0 after the engine has started (``static``, with AdamW's moments), and in its second micro-batch.

    ``persistent``: bytes of the parameters that stay gathered (``stage3_param_persistence_threshold``).
    """

    static: Bytes
    persistent: int
    tracked: Tracked


def simulate(setup: Setup, num_ranks: int, *, micro_batches: int = 2) -> Simulated:
    """Start an engine on rank 0 of ``num_ranks`` and run micro-batches; the second is the first that prefetches.

    Every row has ``data.max_length`` tokens, which are one document, and every token a label, or in classification the
    document: the most there can be.
    """
    nf4.tables(_CPU)  # made of values, so before there are none
    tracker = Tracker()
    whole, skeleton = model_of(setup)
    model = adapted_model(whole, setup.run)
    deepspeed_config = fill_from_model(setup.deepspeed_config, layer_sizes(model)) | {
        "train_batch_size": num_ranks * setup.run.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
    }
    _name_phases(decoder_layers(skeleton), tracker)
    # DeepSpeed's stage 2 looks at addresses, for NCCL's sake.
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
    chunks = patch.dict(MIN_CHUNK_ROWS, cpu=MIN_CHUNK_ROWS[setup.device])
    products = patch.object(torch.backends.mkldnn, "is_available", return_value=False)  # those of which FLOP are known
    with fake_ranks(num_ranks), FakeTensorMode(allow_non_fake_inputs=True), tracker, chunks, products:
        with tracker.under(BASE):
            is_sharded = deepspeed_config["zero_optimization"]["stage"] == 3
            _make_fake(model, ZeroPartition(deepspeed_config, setup.dtype) if is_sharded else Whole(_CPU), tracker)
        with tracker.under(TRAINED):
            engine = _start_engine(model, setup.run, deepspeed_config)
        with tracker.under(BASE):  # which it lays together
            hook_layers(engine)
        static = tracker.tracked.current.copy()
        static[TRAINED] += _moment_bytes(engine)
        with _naming_causes(tracker):
            for _ in range(micro_batches):
                tracker.restart()
                _train_on(_full_batch(setup.run), engine, tracker)
        persistent = _persistent_bytes(engine)
    return Simulated(static, persistent, tracker.tracked)


def model_of(setup: Setup) -> tuple[Any, Any]:
    """The model without memory, with the head of the task, and the part of it that is stored as the base is."""
    config, run = copy.deepcopy(setup.model_config), setup.run
    family, head = FAMILIES[config.model_type], get_task(run.task, run.classification).head(run.train.seed)
    whole: Any = plain_skeleton(config, run.model, setup.dtype, setup.attention, head=head)
    skeleton = whole.base_model if head is not None and family.is_encoder else whole
    freeze(skeleton, run.model, setup.dtype, trained=trained_matrices(run.adapter, family))
    return whole.requires_grad_(False), skeleton


def adapted_model(whole: Any, run: RunConfig) -> nn.Module:
    """What ``model_of`` makes, with the adapters of the run."""
    task = get_task(run.task, run.classification)
    new_modules = () if task.head(run.train.seed) is None else (head_path(whole),)
    name = whole.config.name_or_path
    model = add_adapters(whole, run.adapter, name, run.train.seed, task.peft_task_type, new_modules)
    if run.train.activation_checkpointing:
        whole.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _start_engine(model: nn.Module, run: RunConfig, deepspeed_config: dict[str, Any]) -> Any:
    """As ``qvtune.train.prepare`` does it."""
    import deepspeed

    objective = get_task(run.task, run.classification).objective(model)
    objective._apply = lambda *_, **__: objective  # type: ignore[method-assign]  # torch cannot move fake parameters
    optimizer = torch.optim.AdamW(parameter_groups(trainable(model), run.optimizer))
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=optimizer, config=deepspeed_config, dist_init_required=False
    )
    return engine


def _make_fake(model: nn.Module, placement: Placement, tracker: Tracker) -> None:
    """Replace all parameters and buffers by fake ones, the frozen ones placed as the loader places them."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones are one
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old not in made and old.requires_grad:
                with tracker.under(TRAINED):
                    made[old] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype))
            elif old not in made:
                piece = torch.empty(placement.shard.numel(old.numel()), dtype=old.dtype)
                made[old] = placement.parameter(tuple(old.shape), piece)
            setattr(module, name, made[old])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _moment_bytes(engine: Any) -> int:
    """Bytes of AdamW's two moments, which its first step makes beside the float32 masters."""
    stage_3, stage_2 = "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"
    masters = getattr(engine.optimizer, stage_3 if hasattr(engine.optimizer, stage_3) else stage_2)
    return 2 * sum(int(master.nbytes) for master in masters)


def _persistent_bytes(engine: Any) -> int:
    kept = getattr(engine.optimizer, "persistent_parameters", ())  # at stage 2 there are none
    return sum(int(parameter.ds_numel * parameter.element_size()) for parameter in kept)


def _full_batch(run: RunConfig) -> Batch:
    ids = torch.empty(run.train.micro_batch_size, run.data.max_length, dtype=torch.long)
    borders = torch.empty(run.train.micro_batch_size + 1, dtype=torch.int32)
    labelled = ids.flatten() if run.task == "causal_lm" else ids[:, 0]  # every token, or every document
    return Batch(ids, ids.clone(), ids.clone(), borders, run.data.max_length, labelled.clone())


def _train_on(batch: Batch, engine: Any, tracker: Tracker) -> None:
    tracker.enter("embedding")
    with tracker.under(SAVED):
        loss = engine(batch)
    tracker.enter("backward of the head")
    with tracker.under(LAYER):
        engine.backward(loss)
    release_gathered(engine)  # as the step does


def _name_phases(layers: Sequence[nn.Module], tracker: Tracker) -> None:
    """Tell the tracker when the first, the last and any other layer starts its forward and its backward."""

    def name_phases_of(layer: nn.Module, place: str) -> None:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            hidden_states = output[0] if isinstance(output, tuple) else output
            if hidden_states.requires_grad:
                hidden_states.register_hook(lambda _: tracker.enter(f"backward of the {place} layer"))

        layer.register_forward_pre_hook(lambda *_: tracker.enter(f"forward of the {place} layer"))
        layer.register_forward_hook(after)

    for index, layer in enumerate(layers):
        name_phases_of(layer, "first" if index == 0 else "last" if index == len(layers) - 1 else "other")


@contextmanager
def _naming_causes(tracker: Tracker) -> Iterator[None]:
    """Name the cause of what DeepSpeed gathers, of its second shards (hpZ), and of what the output head allocates."""
    from deepspeed.runtime.zero import partitioned_param_coordinator

    def under(cause: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def tracked(*arguments: Any, **options: Any) -> Any:
            if cause == HEAD:
                tracker.enter("head")
            with tracker.under(cause):
                return method(*arguments, **options)

        return tracked

    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    with (
        patch.object(coordinator, "fetch_sub_module", under(GATHERED, coordinator.fetch_sub_module)),
        patch.object(coordinator, "release_sub_module", under(BASE, coordinator.release_sub_module)),
        patch.object(FrozenHeadLoss, "forward", under(HEAD, FrozenHeadLoss.forward)),
        # The stand-in for a flash kernel takes cu_seqlens, as varlen does; a mask would be made of values.
        patch.object(sequence_classification, "_document_mask", return_value=None),
        # It compares values with those of other ranks; here are neither.
        patch.object(partitioned_param_coordinator, "assert_ints_same_as_other_ranks"),
    ):
        yield
