"""Parameter groups with learning-rate multipliers: eta_V = lambda * eta_QK of arXiv 2410.02247."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from qvtune.config.schema import OptimizerSection
from qvtune.errors import UserError
from qvtune.model.adapters import PROJECTIONS, projection_and_factor, projection_pattern


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: OptimizerSection
) -> list[dict[str, Any]]:
    """One group for each (projection, multiplier) that occurs; every parameter in exactly one, none empty.

    A group holds ``name``, ``params``, ``param_names``, ``multiplier`` and ``initial_lr`` = ``optimizer.lr`` times the
    multiplier. The first pattern of ``optimizer.lr_multipliers`` that matches a parameter's name decides; none: 1.

    Raises UserError listing the patterns that are no regular expression or that decide for no parameter.
    """
    patterns = _compile(optimizer.lr_multipliers)
    used: set[str] = set()
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    names = []
    for name, parameter in parameters:
        names.append(name)
        letter, _ = projection_and_factor(name)
        pattern = next((key for key, expression in patterns if expression.search(name)), None)
        used |= {pattern} if pattern is not None else set()
        multiplier = optimizer.lr_multipliers[pattern] if pattern is not None else 1.0
        group = groups.setdefault((letter, multiplier), {"params": [], "param_names": [], "multiplier": multiplier})
        group["params"].append(parameter)
        group["param_names"].append(name)
    unused = [key for key, _ in patterns if key not in used]
    if unused:
        raise UserError([_no_match(key, names) for key in unused])
    several = {letter for letter, _ in groups if sum(other == letter for other, _ in groups) > 1}
    for (letter, multiplier), group in groups.items():
        group["name"] = f"{letter}*{multiplier:g}" if letter in several else letter
        group["lr"] = group["initial_lr"] = optimizer.lr * multiplier
    return list(groups.values())


def _compile(multipliers: dict[str, float]) -> list[tuple[str, re.Pattern[str]]]:
    compiled, problems = [], []
    for key in multipliers:
        expression = projection_pattern(key) if key in PROJECTIONS else key
        try:
            compiled.append((key, re.compile(expression)))
        except re.error as error:
            problems.append(
                f"optimizer.lr_multipliers: {key!r} is neither one of {', '.join(PROJECTIONS)} "
                f"nor a regular expression ({error})"
            )
    if problems:
        raise UserError(problems)
    return compiled


def _no_match(key: str, names: Sequence[str]) -> str:
    letters = sorted({projection_and_factor(name)[0] for name in names})
    return (
        f"optimizer.lr_multipliers: {key!r} decides for no trained parameter, or an earlier pattern takes all of them; "
        f"trained projections (adapter.projections): {', '.join(letters)}; a parameter's name looks like {names[0]!r}"
    )


def assert_multipliers(param_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]], lr: float) -> None:
    """Prove that the optimizer in use has these groups in this order with ``initial_lr == lr * multiplier``.

    Run after ``deepspeed.initialize`` and after a resume: both rebuild groups, and have lost rates before
    (DeepSpeed #7303, #8171; empty groups shift the rest).
    """
    assert len(param_groups) == len(groups), f"{len(param_groups)} groups in the optimizer, {len(groups)} were built"
    for actual, built in zip(param_groups, groups, strict=True):
        assert actual["name"] == built["name"], (actual["name"], built["name"])
        assert actual["initial_lr"] == lr * built["multiplier"], (
            actual["name"],
            actual["initial_lr"],
            built["multiplier"],
        )
