"""Each cell of method x quantization x ZeRO stage x task: trained as PEFT does, resumed exactly, merged with proof."""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import IA3Config, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from qvtune.checkpoint.folder import complete_checkpoints, newest
from qvtune.convert.convert import convert
from qvtune.data import IGNORE_INDEX
from qvtune.data.order import rows_of_step
from qvtune.model.adapters import is_of_head, saved_name
from tests.distributed import reference
from tests.distributed.test_classification import Reference
from tests.support.lab import Job, Lab, add_encoders, classifier, make_lab

ROUNDING = 1e-5
METHODS = ("lora", "dora", "ia3", "full", "bias")


class Cell(NamedTuple):
    """A combination of settings."""

    method: str
    quantization: str
    stage: str
    task: str

    @property
    def name(self) -> str:
        """Of its runs."""
        return "-".join(self)

    def config(self, lab: Lab, name: str, num_ranks: int = 2, **more: Any) -> dict[str, Any]:
        """Of a run with one micro-batch a step."""
        of_task = classifier(lab, "bert") if self.task == "classification" else {}
        changes = {**of_task, **self.changes, "deepspeed": f"{self.stage}.json", **more}
        return lab.config(name, **changes, train__micro_batch_size=6 // num_ranks)

    @property
    def changes(self) -> dict[str, Any]:
        """What differs between the cells that have the same losses."""
        factors = {"rank": 4, "alpha": 8.0} if self.method in ("lora", "dora") else {}
        return {"adapter": {"method": self.method, **factors}, "model__quantization": self.quantization}


CELLS = [Cell(*one) for one in product(METHODS, ("nf4", "none"), ("zero2", "zero3"), ("causal", "classification"))]
ON_THREE = [cell for cell in CELLS if cell[1:] == ("nf4", "zero3", "classification")]
BY_NAME = [(cell, cell.name) for cell in CELLS]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """All cells, stopped after the third step and continued on 2 ranks; some not stopped, and continued on 3 ranks."""
    odd = {"hidden_size": 90, "head_dim": 22, "num_attention_heads": 6}
    lab = make_lab(tmp_path_factory.mktemp("methods"), num_layers=1, attention_bias=True, **odd)
    add_encoders(lab, num_layers=1)
    stopped = [job(lab, cell, name, train__stop_after_step=3) for cell, name in [*BY_NAME, *variants("on-three")]]
    continued = [job(lab, cell, name) for cell, name in [*BY_NAME, *variants("whole")]]
    on_three = [job(lab, cell, name, num_ranks=3) for cell, name in variants("on-three")]
    for num_ranks, name, jobs in ((2, "stopped", stopped), (2, "continued", continued), (3, "on-three", on_three)):
        jobs += [] if name == "stopped" else [gradients_of_dora(lab, num_ranks)]
        ended = lab.launch(name, num_ranks, jobs)
        assert not any(end.code for end in ended), "\n".join(end.output for end in ended)
    return lab


def variants(suffix: str) -> list[tuple[Cell, str]]:
    """Further runs of those cells that have them."""
    return [(cell, f"{cell.name}-{suffix}") for cell in ON_THREE]


def job(lab: Lab, cell: Cell, name: str, num_ranks: int = 2, **more: Any) -> Job:
    return {"name": name, "do": "train", "config": cell.config(lab, name, num_ranks, **more)}


def gradients_of_dora(lab: Lab, num_ranks: int) -> Job:
    """A run whose first moments are the gradients, as they are."""
    config = Cell("dora", "nf4", "zero3", "causal").config(lab, f"gradients-on-{num_ranks}", num_ranks)
    config["optimizer"] |= {"betas": [0.0, 0.999], "max_grad_norm": 1e9}
    config["train"] |= {"max_steps": 2, "save_every": 1}
    return {"name": "gradients", "do": "train", "config": config}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_it_trains_and_continues_as_peft_trains(lab: Lab, cell: Cell) -> None:
    """Losses and gradient norms of five steps, between which the run was stopped."""
    losses, grad_norms = trained_by_peft(lab, cell._replace(stage=""))
    assert [entry["step"] for entry in lab.events(cell.name, "run_start")] == [0, 3]
    # AdamW's first steps move a weight by the sign of its gradient, even of one that is nothing but rounding, and whole
    # matrices have many of these.
    larger = 10 if cell.method == "full" else 1
    assert lab.losses(cell.name) == pytest.approx(losses, rel=larger * ROUNDING)
    assert lab.grad_norms(cell.name) == pytest.approx(grad_norms, rel=1e-4)  # a norm of differences of the above


@pytest.mark.parametrize("cell", ON_THREE, ids=lambda cell: cell.name)
def test_it_resumes_exactly(lab: Lab, cell: Cell) -> None:
    """To the bit on as many ranks: losses, trained values, masters, moments. On 3 ranks sums have another order."""
    whole, on_three = f"{cell.name}-whole", f"{cell.name}-on-three"
    assert lab.losses(cell.name) == lab.losses(whole) and lab.grad_norms(cell.name) == lab.grad_norms(whole)
    folders = [checkpoint(lab, name) for name in (cell.name, whole)]
    files = sorted(path.name for path in folders[0].glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
    assert [entry["world_size"] for entry in lab.events(on_three, "run_start")] == [2, 3]
    (weights,) = (file for file in files if file != "optimizer.safetensors")
    count = sum(tensor.numel() for tensor in load_file(folders[0] / weights).values())
    starts = lab.events(on_three, "run_start")
    assert [sum(entry["trained_parameters"].values()) for entry in starts] == [count, count]
    assert lab.losses(on_three) == pytest.approx(lab.losses(whole), rel=ROUNDING)
    assert lab.grad_norms(on_three) == pytest.approx(lab.grad_norms(whole), rel=1e-4)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_it_is_merged_with_proof(lab: Lab, cell: Cell, tmp_path: Path) -> None:
    report = convert(lab.run_dir(cell.name), tmp_path / "merged")
    assert report.proof.passed and report.proof.limits.top1_agreement == 1
    updated = [update for update in report.updates if not is_of_head(update.name)]
    modules = ("q_proj", "v_proj") if cell.task == "causal" else ("query", "value")
    kinds = {"bias": ["bias"], "ia3": ["bias", "weight"]}.get(cell.method, ["weight"])
    found = sorted(update.name.split(".")[-2:] for update in updated)
    assert found == [[module, kind] for module in modules for kind in kinds]
    assert all(update.update_norm > 0 for update in updated)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_outputs_and_gradients_of_dora_are_those_of_peft(lab: Lab, num_ranks: int) -> None:
    """Of the second step, at the values that the first one has left, which PEFT reads from the checkpoint."""
    name = f"gradients-on-{num_ranks}"
    first, second = complete_checkpoints(lab.run_dir(name) / "checkpoints")
    model = reference.adapted_model(lab.folder / "model", use_dora=True)
    result = set_peft_model_state_dict(model, load_file(first / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    rows = reference.token_rows(lab)
    mine = [rows[int(index)] for index in rows_of_step(1, 6, len(rows), seed=0)]
    num_labels = sum(int((row.labels != IGNORE_INDEX).sum()) for row in mine)
    loss = torch.stack([reference.summed_loss(model, row) for row in mine]).sum() / num_labels
    loss.backward()
    assert lab.events(name, "step")[1]["loss"] == pytest.approx(loss.item(), rel=ROUNDING)
    found = load_file(second / "optimizer.safetensors")
    trained = {saved_name(key): one.grad for key, one in model.named_parameters() if one.requires_grad}
    assert len(trained) == 2 * 3
    for key, gradient in trained.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(found[f"exp_avg/{key}"], gradient, rtol=1e-5, atol=1e-5 * largest)


def checkpoint(lab: Lab, name: str) -> Path:
    found = newest(lab.run_dir(name) / "checkpoints")
    assert found is not None and found.name == "step-00000005"
    return found


@cache
def trained_by_peft(lab: Lab, cell: Cell) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the same training in one process, without this project."""
    if cell.task == "classification":
        return Reference(lab, "bert", "classes", cell.changes).train()
    folder, quantized = lab.folder / "model", cell.quantization == "nf4"
    if cell.method in ("full", "bias"):
        kind = "weight" if cell.method == "full" else "bias"
        return reference.train(lab, reference.own_parameters_model(folder, quantized=quantized, kind=kind))
    if cell.method == "ia3":
        base = reference.rounded_model(folder) if quantized else reference.plain_model(folder)
        ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], feedforward_modules=[])
        return reference.train(lab, get_peft_model(base, ia3))
    return reference.train(lab, reference.adapted_model(folder, quantized=quantized, use_dora=cell.method == "dora"))
