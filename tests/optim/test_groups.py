"""Parameter groups: every parameter once, the first pattern wins, nothing that was written is without effect."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from qvtune.config.schema import OptimizerSection
from qvtune.errors import UserError
from qvtune.optim.groups import assert_multipliers, count_trained, groups_table, parameter_groups


def parameters(letters: str = "qv", num_layers: int = 3) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"base_model.model.model.layers.{layer}.self_attn.{letter}_proj.lora_{factor}.default.weight", one())
        for layer in range(num_layers)
        for letter in letters
        for factor in "AB"
    ]


def one() -> nn.Parameter:
    return nn.Parameter(torch.ones(1))


def groups_of(multipliers: dict[str, float], letters: str = "qv") -> list[dict[str, Any]]:
    return parameter_groups(parameters(letters), OptimizerSection(lr=1e-3, lr_multipliers=multipliers))


def rates(groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {group["name"]: group["initial_lr"] for group in groups}


def test_one_group_a_projection_with_the_rate_times_its_multiplier() -> None:
    assert rates(groups_of({"v": 4.0})) == {"q": 1e-3, "v": 4e-3}
    assert rates(groups_of({})) == {"q": 1e-3, "v": 1e-3}
    assert rates(groups_of({"q": 0.5, "v": 4.0, "o": 2.0}, "qkvo")) == {"q": 5e-4, "k": 1e-3, "v": 4e-3, "o": 2e-3}


def test_encoders_call_their_projections_otherwise() -> None:
    attention = "base_model.model.encoder.layer.0.attention"
    modules = ("self.query", "self.key", "self.value", "output.dense")
    named = [(f"{attention}.{module}.lora_A.default.weight", one()) for module in modules]
    section = OptimizerSection(lr=1e-3, lr_multipliers={"q": 0.5, "v": 4.0, "o": 2.0})
    assert rates(parameter_groups(named, section)) == {"q": 5e-4, "k": 1e-3, "v": 4e-3, "o": 2e-3}


@pytest.mark.parametrize("multipliers", [{}, {"v": 4.0}, {r"layers\.0\.": 2.0, "q": 3.0}, {"lora_B": 16.0}])
def test_every_parameter_is_in_one_group_and_no_group_is_empty(multipliers: dict[str, float]) -> None:
    named = parameters()
    groups = parameter_groups(named, OptimizerSection(lr_multipliers=multipliers))
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for _, parameter in named)
    assert all(group["params"] for group in groups)
    by_name = dict(named)
    for group in groups:
        assert [
            by_name[name] is parameter for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ]
    assert len({group["name"] for group in groups}) == len(groups)


def test_the_first_pattern_wins() -> None:
    layer_0 = r"layers\.0\."
    first, second = rates(groups_of({layer_0: 2.0, "v": 4.0})), rates(groups_of({"v": 4.0, layer_0: 2.0}))
    assert first == {"q*2": 2e-3, "q*1": 1e-3, "v*2": 2e-3, "v*4": 4e-3}
    assert second == {"q*2": 2e-3, "q*1": 1e-3, "v": 4e-3}


def test_a_regular_expression_on_the_whole_name() -> None:
    groups = groups_of({r"v_proj\.lora_B": 16.0, "v": 4.0})
    assert rates(groups) == {"q": 1e-3, "v*4": 4e-3, "v*16": 16e-3}
    (matched,) = (group for group in groups if group["multiplier"] == 16.0)
    assert len(matched["param_names"]) == 3
    assert all("v_proj.lora_B" in name for name in matched["param_names"])


def test_two_patterns_with_one_multiplier_share_a_group() -> None:
    groups = groups_of({r"layers\.0\..*q_proj": 2.0, "q": 2.0})
    assert rates(groups) == {"q": 2e-3, "v": 1e-3}
    assert len(groups[0]["params"]) == 6


def test_factors_have_rates_of_their_own() -> None:
    """LoRA+ (arXiv 2402.12354): B learns faster than A. Alone, of one projection, and both."""
    assert rates(groups_of({"B": 16.0})) == {"q": 1e-3, "q.B": 16e-3, "v": 1e-3, "v.B": 16e-3}
    assert rates(groups_of({"v.B": 16.0})) == {"q": 1e-3, "v": 1e-3, "v.B": 16e-3}
    both = groups_of({"v.B": 64.0, "B": 16.0, "v": 4.0, "q.A": 0.5})
    assert rates(both) == {"q.A": 5e-4, "q.B": 16e-3, "v": 4e-3, "v.B": 64e-3}
    by_name = {group["name"]: group["param_names"] for group in both}
    assert len(by_name["v.B"]) == 3 and all("v_proj.lora_B" in name for name in by_name["v.B"])
    assert len(by_name["v"]) == 3 and all("v_proj.lora_A" in name for name in by_name["v"])


def test_a_factor_behind_its_projection_is_without_effect() -> None:
    """The first match wins, whatever is the more specific one."""
    with pytest.raises(
        UserError, match=r"'v.B' decides for no trained .* an earlier pattern .* narrower key first.* each with A, B"
    ):
        groups_of({"v": 4.0, "v.B": 64.0})


def test_magnitudes_and_biases_can_have_rates_of_their_own() -> None:
    """And biases do not decay, magnitudes do."""
    layer = "base_model.model.model.layers.0.self_attn"
    named = [(f"{layer}.v_proj.lora_magnitude_vector.default.weight", one()), (f"{layer}.q_proj.bias", one())]
    section = OptimizerSection(lr=1e-3, lr_multipliers={"v.magnitude": 2.0, "bias": 3.0}, weight_decay=0.1)
    groups = parameter_groups(named, section)
    assert rates(groups) == {"v.magnitude": 2e-3, "q.bias": 3e-3}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    in_paper = parameter_groups(named, OptimizerSection(lr=1e-3, lr_multipliers={"v": 4.0}, as_in_paper=True))
    assert rates(in_paper) == {"v": 4e-3}


def test_a_letter_is_the_projection_and_no_regular_expression() -> None:
    assert rates(groups_of({"o": 8.0}, "qo")) == {"q": 1e-3, "o": 8e-3}, "every name has an o in it"


@pytest.mark.parametrize("pattern", ["k", "mlp", r"layers\.9\."])
def test_a_pattern_without_effect_is_an_error_that_says_what_there_is(pattern: str) -> None:
    with pytest.raises(UserError) as caught:
        groups_of({pattern: 2.0, "v": 4.0})
    (problem,) = caught.value.problems
    assert f"optimizer.lr_multipliers: {pattern!r}" in problem
    assert "q, v" in problem and "layers.0.self_attn.q_proj.lora_A" in problem


def test_a_pattern_behind_one_that_takes_everything_is_without_effect() -> None:
    with pytest.raises(UserError, match="'v' decides for no trained parameter, or an earlier pattern takes all"):
        groups_of({"_proj": 2.0, "v": 4.0})


def test_all_patterns_without_effect_are_named() -> None:
    with pytest.raises(UserError) as caught:
        groups_of({"k": 2.0, "mlp": 3.0})
    assert [name in problem for name, problem in zip(("'k'", "'mlp'"), caught.value.problems, strict=True)] == [
        True
    ] * 2


def test_all_bad_regular_expressions_are_named() -> None:
    with pytest.raises(UserError) as caught:
        groups_of({"(": 2.0, "v": 4.0, "[a": 3.0})
    first, second = caught.value.problems
    assert "'(' is neither one of q, k, v, o, gate, up, down, head, A, B, magnitude, bias" in first
    assert "'[a'" in second


def adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    return torch.optim.AdamW([dict(group) for group in groups], lr=1e-3, weight_decay=0.0)


def test_torch_moves_each_group_by_its_rate() -> None:
    """From zero moments AdamW moves every weight by lr * sign(gradient)."""
    groups = groups_of({"v": 4.0, "q": 0.5})
    optimizer = adamw(groups)
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    for group, expected in zip(groups, (5e-4, 4e-3), strict=True):
        for parameter in group["params"]:
            torch.testing.assert_close(
                1.0 - parameter.item(), expected, rtol=1e-4, atol=0
            )  # 1 - 5e-4 in fp32: 4 digits


def test_the_proof_holds_for_the_optimizer_that_was_built() -> None:
    groups = groups_of({"v": 4.0})
    assert_multipliers(adamw(groups).param_groups, groups, lr=1e-3)


def lose_a_rate(param_groups: list[dict[str, Any]]) -> None:
    param_groups[1]["initial_lr"] = param_groups[0]["initial_lr"]


def swap(param_groups: list[dict[str, Any]]) -> None:
    param_groups.reverse()


def drop(param_groups: list[dict[str, Any]]) -> None:
    param_groups.pop()


def rename(param_groups: list[dict[str, Any]]) -> None:
    param_groups[0]["name"], param_groups[1]["name"] = param_groups[1]["name"], param_groups[0]["name"]


@pytest.mark.parametrize("damage", [lose_a_rate, swap, drop, rename])
def test_the_proof_fails_when_the_optimizer_has_other_groups(damage: Any) -> None:
    groups = groups_of({"v": 4.0})
    optimizer = adamw(groups)
    damage(optimizer.param_groups)
    with pytest.raises(AssertionError):
        assert_multipliers(optimizer.param_groups, groups, lr=1e-3)


HEAD = {"weight": torch.ones(2, 4), "bias": torch.ones(2)}


def with_head() -> list[tuple[str, nn.Parameter]]:
    paths = {f"base_model.model.classifier.modules_to_save.default.{kind}": value for kind, value in HEAD.items()} | {
        f"base_model.model.bert.pooler.modules_to_save.default.dense.{kind}": value for kind, value in HEAD.items()
    }
    return [*parameters(), *((name, nn.Parameter(value.clone())) for name, value in paths.items())]


def test_a_head_is_a_group_of_its_own_without_decay() -> None:
    section = OptimizerSection(lr=1e-3, lr_multipliers={"v": 4.0, "head": 8.0}, weight_decay=0.1)
    groups = parameter_groups(with_head(), section)
    assert rates(groups) == {"q": 1e-3, "v": 4e-3, "head": 8e-3}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert len(groups[-1]["param_names"]) == 4


def test_the_matrices_of_a_head_may_decay_and_its_biases_do_not() -> None:
    groups = parameter_groups(with_head(), OptimizerSection(lr=1e-3, head_weight_decay=0.5))
    by_name = {group["name"]: group for group in groups}
    assert list(by_name) == ["q", "v", "head decay 0.5", "head decay 0"]
    assert [name.rpartition(".")[2] for name in by_name["head decay 0"]["param_names"]] == ["bias"] * 2
    optimizer = torch.optim.AdamW([dict(group) for group in groups], lr=1e-3)
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group in groups:
        for parameter in group["params"]:
            expected = 1 - 1e-3 * group["weight_decay"]
            torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))


def test_a_head_as_in_the_paper() -> None:
    """Its matrices at eta_QK, its biases at eta_V."""
    named = [*with_head(), *parameters("k")]
    groups = parameter_groups(named, OptimizerSection(lr=1e-3, lr_multipliers={"v": 4.0}, as_in_paper=True))
    assert rates(groups) == {"qk": 1e-3, "v": 4e-3}
    by_name = {group["name"]: set(group["param_names"]) for group in groups}
    assert by_name["v"] == {name for name, _ in named if "v_proj" in name or name.endswith(".bias")}
    assert by_name["qk"] == {name for name, _ in named} - by_name["v"]
    with pytest.raises(ValidationError, match="no other lr_multipliers than v, but has q, head"):
        OptimizerSection(lr_multipliers={"q": 2.0, "v": 4.0, "head": 1.0}, as_in_paper=True)


def test_the_table_shows_count_rate_and_decay() -> None:
    section = OptimizerSection(lr=1e-3, lr_multipliers={"v": 4.0}, head_weight_decay=0.5)
    table = groups_table(parameter_groups(with_head(), section))
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    assert columns == [
        ["q", "v", "head decay 0.5", "head decay 0"],
        ["6", "6", "16", "4"],
        ["0.001", "0.004", "0.001", "0.001"],
        ["1", "4", "1", "1"],
        ["0", "0", "0.5", "0"],
    ]


def test_trained_parameters_are_counted_by_projection_and_head() -> None:
    partitioned = nn.Parameter(torch.zeros(0))
    partitioned.ds_numel = 60  # type: ignore[attr-defined]  # as ZeRO-3 does
    name = "base_model.model.model.layers.9.self_attn.k_proj.lora_A.default.weight"
    assert count_trained([*with_head(), (name, partitioned)]) == {"q": 6, "v": 6, "head": 20, "k": 60}
