"""Parameter groups with learning-rate multipliers: eta_V = lambda * eta_QK of arXiv 2410.02247."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.table import Column, Table
from torch import nn

from qvtune.config.schema import OptimizerSection
from qvtune.errors import UserError
from qvtune.model.adapters import FACTORS, GROUPS, HEAD, PROJECTIONS, group_and_factor

_OF_FACTORS = {*FACTORS, *(f"{letter}.{factor}" for letter in PROJECTIONS for factor in FACTORS)}
Matches = Callable[[str], bool]  # a parameter's name -> whether a key of lr_multipliers is for it


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: OptimizerSection
) -> list[dict[str, Any]]:
    """One group for each (projection or head, multiplier, decay) that occurs; every parameter in one, none empty.

    A group holds ``name``, ``params``, ``param_names``, ``multiplier``, ``initial_lr`` = ``optimizer.lr`` times the
    multiplier, and ``weight_decay``. The first key of ``optimizer.lr_multipliers`` that matches a parameter decides;
    none: 1. What a key like ``B`` or ``v.B`` decides for is in a group of that name, ``v.B``. Matrices of a head have
    ``optimizer.head_weight_decay``; biases have no decay. With ``optimizer.as_in_paper`` the groups are ``qk`` and
    ``v``, where a head's matrices and its biases belong to.

    Raises UserError listing the keys that are no regular expression or that decide for no parameter.
    """
    keys = _compile(optimizer.lr_multipliers)
    used: set[str] = set()
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    names = []
    for name, parameter in parameters:
        names.append(name)
        letter, factor = group_and_factor(name)
        decay = _weight_decay(letter, name, optimizer)
        key = next((key for key, matches in keys if matches(name)), None)
        if optimizer.as_in_paper:
            letter = _group_in_paper(letter, factor, name)
            key = letter if letter in optimizer.lr_multipliers else None
        used |= {key} if key is not None else set()
        multiplier = optimizer.lr_multipliers[key] if key is not None else 1.0
        letter = f"{letter}.{factor}" if key in _OF_FACTORS else letter
        group = groups.setdefault(
            (letter, multiplier, decay),
            {"params": [], "param_names": [], "multiplier": multiplier, "weight_decay": decay},
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    unused = [key for key, _ in keys if key not in used]
    if unused:
        raise UserError([_no_match(key, names) for key in unused])
    _name_groups(groups)
    for group in groups.values():
        group["lr"] = group["initial_lr"] = optimizer.lr * group["multiplier"]
    return list(groups.values())


def count_trained(parameters: Iterable[tuple[str, nn.Parameter]]) -> Counter[str]:
    """Projection, or head -> elements of its parameters, whole also where ZeRO-3 has a part of them here."""
    counts: Counter[str] = Counter()
    for name, parameter in parameters:
        counts[group_and_factor(name)[0]] += getattr(parameter, "ds_numel", parameter.numel())
    return counts


def _weight_decay(letter: str, name: str, optimizer: OptimizerSection) -> float:
    if name.endswith(".bias"):
        return 0.0
    return optimizer.head_weight_decay if letter == HEAD else optimizer.weight_decay


def _group_in_paper(letter: str, factor: str | None, name: str) -> str:
    """The authors sort by names and dimensions: what is neither of V nor one-dimensional trains with W_q and W_k."""
    if factor == "magnitude" or name.endswith(".bias"):
        return "v"
    return "qk" if letter in ("q", "k", HEAD) else letter


def _name_groups(groups: dict[tuple[str, float, float], dict[str, Any]]) -> None:
    """``v``; where it has several multipliers ``v*4``; where a multiplier has several decays ``head*1 decay 0.1``."""
    for (letter, multiplier, decay), group in groups.items():
        others = [key for key in groups if key[0] == letter and key != (letter, multiplier, decay)]
        group["name"] = letter
        if any(other[1] != multiplier for other in others):
            group["name"] += f"*{multiplier:g}"
        if any(other[1] == multiplier for other in others):
            group["name"] += f" decay {decay:g}"


def groups_table(groups: Sequence[dict[str, Any]]) -> Table:
    """Name, number of parameters, rate and decay of each group, for the console."""
    right = [Column(heading, justify="right") for heading in ("parameters", "lr", "multiplier", "weight decay")]
    table = Table("group", *right, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for group in groups:
        count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in group["params"])
        rates = (f"{group[key]:g}" for key in ("initial_lr", "multiplier", "weight_decay"))
        table.add_row(group["name"], f"{count:,}", *rates)
    return table


def _compile(multipliers: dict[str, float]) -> list[tuple[str, Matches]]:
    compiled: list[tuple[str, Matches]] = []
    problems = []
    for key in multipliers:
        try:
            compiled.append((key, _matcher(key)))
        except re.error as error:
            problems.append(
                f"optimizer.lr_multipliers: {key!r} is neither one of {', '.join((*GROUPS, *FACTORS))} or like v.B, "
                f"nor a regular expression ({error})"
            )
    if problems:
        raise UserError(problems)
    return compiled


def _matcher(key: str) -> Matches:
    """Raises re.error for what is neither a group nor a factor nor a regular expression."""
    if key in GROUPS or key in _OF_FACTORS:
        return lambda name: key in _keys_of(name)
    expression = re.compile(key)
    return lambda name: expression.search(name) is not None


def _keys_of(name: str) -> tuple[str, ...]:
    """``v``, ``B`` and ``v.B``; of a matrix itself ``v``."""
    letter, factor = group_and_factor(name)
    return (letter,) if factor is None else (letter, factor, f"{letter}.{factor}")


def _no_match(key: str, names: Sequence[str]) -> str:
    letters, factors = (sorted({*found} - {None}) for found in zip(*map(group_and_factor, names), strict=True))
    parts = f", each with {', '.join(factors)}" if factors else ""
    return (
        f"optimizer.lr_multipliers: {key!r} decides for no trained parameter, or an earlier pattern takes all of them "
        "(the first match wins: give the whole mapping, the narrower key first, as in '{v.B: 64, v: 4}'); "
        f"trained groups (adapter.projections): {', '.join(letters)}{parts}; a parameter's name looks like {names[0]!r}"
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
