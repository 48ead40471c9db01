"""How many parameters a configuration trains, by group, from the base's config.json alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qvtune.config.schema import RunConfig
from qvtune.errors import UserError, naming_setting
from qvtune.model.adapters import HEAD, add_adapters, trainable
from qvtune.model.families import FAMILIES, ends_in
from qvtune.model.head import head_path
from qvtune.model.skeleton import plain_skeleton, read_model_config
from qvtune.optim.groups import count_trained
from qvtune.plan.plan import config_folder
from qvtune.tasks import get_task


@dataclass(frozen=True)
class Counts:
    """``groups``: projection, or head -> trained parameters. ``shapes``: projection -> [outputs, inputs] per layer."""

    groups: Counter[str]
    shapes: dict[str, list[tuple[int, int]]]

    @property
    def adapters(self) -> int:
        """Without the head."""
        return self.groups.total() - self.groups[HEAD]


def rank_for(run: RunConfig, parameters: int) -> int:
    """The rank at which the run's adapter, without a head, has the number of parameters nearest to ``parameters``.

    Raises UserError where that is none: with a rank of 1 it has more than half as many again.
    """
    one, two = (
        count_parameters(run.model_copy(update={"adapter": run.adapter.model_copy(update={"rank": rank})})).adapters
        for rank in (1, 2)
    )
    rank = max(1, round((parameters - one) / (two - one)) + 1)
    if 2 * one > 3 * parameters:
        names = " ".join(run.adapter.projections)
        raise UserError(f"parameters {parameters:,}: projections {names} have {one:,} at rank 1; give more")
    return rank


def count_parameters(run: RunConfig, projections: Sequence[str] | None = None) -> Counts:
    """Of a run, or of the same run with other ``projections``. The pooler of an encoder is taken to be frozen.

    Raises UserError for a base or projections that cannot be trained.
    """
    adapter = run.adapter if projections is None else run.adapter.model_copy(update={"projections": tuple(projections)})
    folder, task = config_folder(run), get_task(run.task, run.classification)
    with naming_setting("model.name_or_path"):
        config = read_model_config(folder, run.model)
    head = task.head(run.train.seed)
    model: Any = plain_skeleton(config, run.model, torch.float32, "sdpa", head=head)
    family = FAMILIES[config.model_type]
    shapes = {
        letter: [tuple(layer.weight.shape) for path, layer in model.named_modules() if ends_in(path, [module])]
        for letter, module in family.projections.items()
    }
    new_modules = () if head is None else (head_path(model),)
    model = add_adapters(model.requires_grad_(False), adapter, str(folder), 0, task.peft_task_type, new_modules)
    return Counts(count_trained(trainable(model)), shapes)
