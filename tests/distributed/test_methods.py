"""Each cell of method x quantization x ZeRO stage x task: trained as PEFT does, resumed exactly, merged with proof."""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from qvtune.checkpoint.folder import complete_checkpoints, newest
from qvtune.convert.convert import convert
from qvtune.data import IGNORE_INDEX
from qvtune.data.order import rows_of_step
from qvtune.model.adapters import saved_name
from tests.distributed import reference
from tests.distributed.test_classification import Reference
from tests.support.lab import Job, Lab, add_encoders, classifier, make_lab

ROUNDING = 1e-5
METHODS = ("lora", "dora")
OF_PEFT: dict[str, dict[str, Any]] = {"dora": {"use_dora": True}}  # settings of PEFT's configuration


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

    def config(self, lab: Lab, name: str, num_ranks: int = 2) -> dict[str, Any]:
        """Of a run that saves before its end, with one micro-batch a step."""
        of_task = classifier(lab, "bert") if self.task == "classification" else {}
        return lab.config(
            name,
            **of_task | self.changes,
            deepspeed=f"{self.stage}.json",
            train__save_every=3,
            train__micro_batch_size=6 // num_ranks,
        )

    @property
    def changes(self) -> dict[str, Any]:
        """What differs between the cells that have the same losses."""
        return {"adapter__method": self.method, "model__quantization": self.quantization}


CELLS = [Cell(*one) for one in product(METHODS, ("nf4", "none"), ("zero2", "zero3"), ("causal", "classification"))]
ON_THREE = [cell for cell in CELLS if cell[1:] == ("nf4", "zero3", "classification")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = make_lab(tmp_path_factory.mktemp("methods"), num_layers=1)
    add_encoders(lab, num_layers=1)
    return lab


@pytest.fixture(scope="module")
def ranks(lab: Lab) -> Lab:
    """On 2 ranks each cell from start to end, and again from its first checkpoint; some from there on 3 ranks, too."""
    jobs: list[Job] = [
        {
            "name": cell.name,
            "do": "train_and_resume",
            "config": cell.config(lab, cell.name),
            "copies": [str(lab.run_dir(f"{cell.name}-{copy}")) for copy in ("resumed", "on-three")],
        }
        for cell in CELLS
    ]
    on_three: list[Job] = [
        {"name": cell.name, "do": "train", "config": cell.config(lab, f"{cell.name}-on-three", num_ranks=3)}
        for cell in ON_THREE
    ]
    for num_ranks, name, of_launch in ((2, "two", jobs), (3, "three", on_three)):
        ended = lab.launch(name, num_ranks, [*of_launch, gradients_of_dora(lab, num_ranks)])
        assert not any(end.code for end in ended), "\n".join(end.output for end in ended)
    return lab


def gradients_of_dora(lab: Lab, num_ranks: int) -> Job:
    """A run whose first moments are the gradients, as they are."""
    config = Cell("dora", "nf4", "zero3", "causal").config(lab, f"gradients-on-{num_ranks}", num_ranks)
    config["optimizer"] |= {"betas": [0.0, 0.999], "max_grad_norm": 1e9}
    config["train"] |= {"max_steps": 2, "save_every": 1}
    return {"name": "gradients", "do": "train", "config": config}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_it_trains_as_peft_does(ranks: Lab, cell: Cell) -> None:
    """Losses and gradient norms of five steps."""
    losses, grad_norms = trained_by_peft(ranks, cell._replace(stage=""))
    assert ranks.losses(cell.name) == pytest.approx(losses, rel=ROUNDING)
    assert ranks.grad_norms(cell.name) == pytest.approx(grad_norms, rel=1e-4)  # a norm of differences of the above


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_it_resumes_exactly(ranks: Lab, cell: Cell) -> None:
    """To the bit: losses, trained values, masters and moments."""
    resumed = f"{cell.name}-resumed"
    assert [entry["step"] for entry in ranks.events(resumed, "run_start")] == [0, 3]
    assert ranks.losses(resumed) == ranks.losses(cell.name)
    assert ranks.grad_norms(resumed) == ranks.grad_norms(cell.name)
    folders = [checkpoint(ranks, name) for name in (resumed, cell.name)]
    files = sorted(path.name for path in folders[0].glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


@pytest.mark.parametrize("cell", ON_THREE, ids=lambda cell: cell.name)
def test_it_resumes_on_three_ranks(ranks: Lab, cell: Cell) -> None:
    """Sums of float32 have another order there."""
    on_three = f"{cell.name}-on-three"
    assert [entry["world_size"] for entry in ranks.events(on_three, "run_start")] == [2, 3]
    assert ranks.losses(on_three) == pytest.approx(ranks.losses(cell.name), rel=ROUNDING)
    assert ranks.grad_norms(on_three) == pytest.approx(ranks.grad_norms(cell.name), rel=1e-4)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_it_is_merged_with_proof(ranks: Lab, cell: Cell, tmp_path: Path) -> None:
    report = convert(ranks.run_dir(cell.name), tmp_path / "merged")
    assert report.proof.passed and report.proof.limits.top1_agreement == 1
    assert {update.name.split(".")[-2] for update in report.updates} in ({"q_proj", "v_proj"}, {"query", "value"})
    assert all(update.update_norm > 0 for update in report.updates)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_outputs_and_gradients_of_dora_are_those_of_peft(ranks: Lab, num_ranks: int) -> None:
    """Of the second step, at the values that the first one has left, which PEFT reads from the checkpoint."""
    name = f"gradients-on-{num_ranks}"
    first, second = complete_checkpoints(ranks.run_dir(name) / "checkpoints")
    model = reference.adapted_model(ranks.folder / "model", use_dora=True)
    result = set_peft_model_state_dict(model, load_file(first / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    rows = reference.token_rows(ranks)
    mine = [rows[int(index)] for index in rows_of_step(1, 6, len(rows), seed=0)]
    num_labels = sum(int((row.labels != IGNORE_INDEX).sum()) for row in mine)
    loss = torch.stack([reference.summed_loss(model, row) for row in mine]).sum() / num_labels
    loss.backward()
    assert ranks.events(name, "step")[1]["loss"] == pytest.approx(loss.item(), rel=ROUNDING)
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
    of_peft = OF_PEFT.get(cell.method, {})
    if cell.task == "classification":
        return Reference(lab, "bert", "classes", cell.changes, **of_peft).train()
    quantized = cell.quantization == "nf4"
    return reference.train(lab, reference.adapted_model(lab.folder / "model", quantized=quantized, **of_peft))
