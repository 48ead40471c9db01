"""Attention before and after training: measures by hand, and those of a model against PEFT and transformers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as entropy_of_scipy
from transformers import AutoModelForCausalLM, AutoTokenizer

from qvtune.convert.proof.texts import PROMPTS
from qvtune.errors import UserError
from qvtune.study.attention import compare_attention, measure_runs
from qvtune.study.attention_report import ATTENTION_FILE, attention_of
from qvtune.study.report import write_report
from qvtune.study.results import read_results
from tests.support.studies import cell, make_study
from tests.support.tiny import make_model_folder


def test_measures_by_hand() -> None:
    base, adapted = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.75, 0.0]])
    found = {name: values.item() for name, values in compare_attention(base, adapted).items()}
    after = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    middle = [0.375, 0.625]
    js = 0.5 * sum(
        p * math.log(p / m) for pair in ([0.25, 0.75], [0.5, 0.5]) for p, m in zip(pair, middle, strict=True)
    )
    assert found["entropy_base"] == pytest.approx(math.log(2))
    assert found["entropy_change"] == pytest.approx(after - math.log(2))
    assert found["kl"] == pytest.approx(0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))
    assert found["js"] == pytest.approx(js)


def test_disjoint_attention_is_as_far_apart_as_can_be() -> None:
    found = compare_attention(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert found["js"].item() == pytest.approx(math.log(2)) and found["kl"].item() > 50
    assert found["entropy_base"].item() == found["entropy_change"].item() == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("attention") / "base", dtype=torch.float32)


def make_adapter(base: Path, folder: Path, *modules: str) -> Path:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=list(modules), r=4, init_lora_weights=False, base_model_name_or_path=str(base))
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def by_peft(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """[layers, heads], by SciPy on the probabilities that transformers gives."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    values: dict[str, list[np.ndarray]] = {"entropy_change": [], "kl": [], "js": []}
    for prompt in PROMPTS:
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"][:20]
        with torch.no_grad():
            after = torch.cat(model(torch.tensor([ids]), output_attentions=True).attentions).double().numpy()
            with model.disable_adapter():
                before = torch.cat(model(torch.tensor([ids]), output_attentions=True).attentions).double().numpy()
        values["entropy_change"].append(entropy_of_scipy(after, axis=-1) - entropy_of_scipy(before, axis=-1))
        values["kl"].append(entropy_of_scipy(after, before, axis=-1))
        values["js"].append(jensenshannon(after, before, axis=-1) ** 2)
    return {name: np.concatenate(found, axis=2).mean(axis=2) for name, found in values.items()}


def test_a_run_is_measured_as_peft_and_scipy_do_and_shown_in_the_report(base: Path, tmp_path: Path) -> None:
    """Of v alone the first layer's attention stays as it is; of q and v it does not."""
    cells = [cell(projections="v"), cell(projections="qv")]
    study = make_study(tmp_path / "s", cells, num_rows=10)
    for one, modules in zip(cells, (["v_proj"], ["q_proj", "v_proj"]), strict=True):
        adapter = make_adapter(base, study / "cells" / one.name, *modules)
        measure_runs([adapter], num_rows=8, max_tokens=20)
        found = attention_of(read_results(study))[one.name]
        for name, expected in by_peft(base, adapter).items():
            np.testing.assert_allclose(found[name], expected, atol=2e-6, rtol=1e-3)
        assert (found["kl"][0] == 0).all() == (modules == ["v_proj"])
        assert found["kl"][1].min() > 1e-5
    write_report(study)
    made = (study / "report.html").read_text()
    assert "Kullback-Leibler" in made and (study / "figures" / "attention.png").is_file()
    rows = (study / "tables" / "attention.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * np.prod(found["kl"].shape)


def test_runs_without_a_checkpoint_are_named_together(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError) as error:
        measure_runs([tmp_path / "first", tmp_path / "second"], 8, 128)
    assert len(error.value.problems) == 2 and not list(tmp_path.rglob(ATTENTION_FILE))
