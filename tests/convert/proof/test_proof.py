"""What a conversion proves and reports, on the whole path."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qvtune.convert.conversion import open_conversion
from qvtune.convert.convert import convert
from qvtune.convert.merge import tensors
from qvtune.convert.merge.changes import LowRank
from qvtune.convert.proof.texts import PROMPTS, evaluation_rows, fixed_prompts
from qvtune.convert.sources.source import open_source
from qvtune.data import IGNORE_INDEX
from qvtune.errors import ProofError
from tests.convert.conftest import MakeRun, State
from tests.support.tiny import make_model_folder

ROW = '{"prompt": "hello", "completion": " world, what does the name say?"}\n'


def with_rows(folder: Path) -> str:
    (folder / "eval.jsonl").write_text(ROW * 3)
    return str(folder / "eval.jsonl")


def test_prompts_are_a_users_turn_or_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [tokenizer.decode(text.ids) for text in fixed_prompts(tokenizer)]
    tokenizer.chat_template = None
    plain = [tokenizer.decode(text.ids) for text in fixed_prompts(tokenizer)]
    assert plain == list(PROMPTS)
    assert chat[0].endswith(f"<|im_start|>user\n{PROMPTS[0]}<|im_end|>\n<|im_start|>assistant\n")
    assert all(set(text.targets) == {IGNORE_INDEX} for text in fixed_prompts(tokenizer))


def test_targets_are_the_next_token_where_the_run_has_a_loss(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    run = make_run(llama_folder, eval=with_rows(tmp_path))
    for text in evaluation_rows(tokenizer, open_source(run).path, 2):
        assert len(text.targets) == len(text.ids)
        labelled = [at for at, target in enumerate(text.targets) if target != IGNORE_INDEX]
        assert [text.targets[at] for at in labelled] == [text.ids[at + 1] for at in labelled]
        assert "world" in tokenizer.decode([text.ids[at + 1] for at in labelled])
        assert "hello" not in tokenizer.decode([text.ids[at + 1] for at in labelled])


@pytest.mark.parametrize("base_weights", ["dequantized", "original"])
def test_losses_and_choices_are_those_of_whole_models(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, base_weights: str
) -> None:
    run = make_run(llama_folder, eval=with_rows(tmp_path))
    report = convert(run, tmp_path / "merged", base_weights=base_weights, dtype="bfloat16")  # type: ignore[arg-type]
    source = open_source(run)
    texts = fixed_prompts(tokenizer) + evaluation_rows(tokenizer, source.path, None)

    def base(choice: str) -> torch.nn.Module:
        conversion = open_conversion(source, choice, "auto")  # type: ignore[arg-type]
        model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            parameter.data = conversion.base.reader(name)(0, parameter.numel()).float().view(parameter.shape)
        return model

    def run_on_texts(model: torch.nn.Module) -> tuple[torch.Tensor, float]:
        with torch.no_grad():
            logits = torch.cat([model.eval()(input_ids=torch.tensor([text.ids])).logits[0] for text in texts])
        targets = torch.tensor([target for text in texts for target in text.targets])
        return logits.log_softmax(-1), float(torch.nn.functional.cross_entropy(logits, targets))

    other = "original" if base_weights == "dequantized" else "dequantized"
    _, loss_before = run_on_texts(base("dequantized"))
    adapted, loss_adapted = run_on_texts(PeftModel.from_pretrained(base("dequantized"), source.path))
    merged, loss_merged = run_on_texts(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    convert(run, tmp_path / "other", base_weights=other, dtype="bfloat16")  # type: ignore[arg-type]
    otherwise, _ = run_on_texts(AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float32))

    assert report.losses is not None
    assert report.losses.label_tokens == sum(target != IGNORE_INDEX for text in texts for target in text.targets)
    expected_losses = (loss_before, loss_adapted, loss_merged)
    assert (report.losses.before, report.losses.adapted, report.losses.merged) == pytest.approx(expected_losses, 1e-5)
    for name, log_probs in (("chosen", merged), ("other", otherwise)):
        kl = torch.nn.functional.kl_div(log_probs, adapted, log_target=True, reduction="batchmean")
        assert report.from_training[name].mean_kl == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        agreement = (log_probs.argmax(-1) == adapted.argmax(-1)).float().mean()
        assert report.from_training[name].top1_agreement == pytest.approx(float(agreement), abs=1e-6)
    assert report.proof.top1_agreement >= 0.98  # against the chosen base + adapter, whichever that is
    assert max(one.mean_kl for one in report.from_training.values()) > 100 * report.proof.mean_kl


def test_without_another_choice_there_is_nothing_to_compare(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path
) -> None:
    report = convert(make_run(llama_folder, quantization="none"), tmp_path / "merged")
    assert report.from_training == {}
    assert report.losses is None


def test_a_merge_with_one_wrong_matrix_fails(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, calls = LowRank.apply, []

    def once_wrong(self: LowRank, weight: torch.Tensor) -> torch.Tensor:
        calls.append(weight)
        return weight if len(calls) == 1 else apply(self, weight)

    run = make_run(llama_folder)
    monkeypatch.setattr(LowRank, "apply", once_wrong)
    with pytest.raises(ProofError):
        convert(run, tmp_path / "merged")
    assert len(calls) == 4 + 4  # written, and the other choice
    assert not list(tmp_path.glob("*merged*"))


def scaled(factor: float) -> object:
    def edit(state: State) -> None:
        for name, entry in state.items():
            if "lora_B" in name:
                state[name] = {key: value * factor for key, value in entry.items()}

    return edit


@pytest.mark.parametrize(
    ("factor", "base_weights", "lost"),
    [(1.0, "original", False), (1.0, "dequantized", False), (1e-3, "original", True), (1e-3, "dequantized", True)],
)
def test_an_update_that_rounding_takes_away_is_warned_of(
    make_run: MakeRun,
    llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    base_weights: str,
    lost: bool,
) -> None:
    run = make_run(llama_folder, edit=scaled(factor))
    report = convert(run, tmp_path / "merged", base_weights=base_weights, dtype="bfloat16")  # type: ignore[arg-type]
    assert [update.lost for update in report.updates] == [lost] * 4
    assert ("warning: rounding to bfloat16 loses the update of 4 matrices" in capsys.readouterr().out) == lost
    kept = [update.kept for update in report.updates]
    if base_weights == "original":  # on bfloat16's grid, so what is too small is gone
        assert max(kept) < 0.5 if lost else min(kept) > 0.95
    exact = convert(run, tmp_path / "exact", base_weights=base_weights, dtype="float32")  # type: ignore[arg-type]
    assert not exact.warnings
    assert [update.kept for update in exact.updates] == pytest.approx([1.0] * 4, abs=1e-3)


def test_rounding_is_measured_as_its_formula_says(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    run = make_run(llama_folder, edit=scaled(0.05))
    report = convert(run, tmp_path / "merged", base_weights="original", dtype="bfloat16")
    conversion = open_conversion(open_source(run), "original", "bfloat16")
    for update in report.updates:
        weight = conversion.base.reader(update.name)(0, conversion.base.tensors[update.name].numel)
        weight = weight.double().view(conversion.base.tensors[update.name].shape)
        change = conversion.adapter.changes[update.name]
        assert isinstance(change, LowRank)
        delta = change.scaling * change.factor_b.double() @ change.factor_a.double()
        rounded = (weight + delta).bfloat16().double()
        assert update.rounding_norm == pytest.approx(float((rounded - weight - delta).norm()), rel=1e-3)
        assert update.kept == pytest.approx(float(((rounded - weight) * delta).sum() / delta.square().sum()), rel=1e-3)


def test_the_card_is_read_by_the_hub(make_run: MakeRun, tmp_path: Path) -> None:
    base = make_model_folder(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: llama3.1\ntags: [theirs]\n---\n# Base\n")
    run = make_run(base, eval=with_rows(tmp_path))
    report = convert(run, tmp_path / "merged")
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "llama3.1"
    assert data["pipeline_tag"] == "text-generation"
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["qvtune", "merged", "lora"]
    assert "base_model" not in data  # a folder of this machine, which the hub does not know
    sections = [line for line in card.text.splitlines() if line.startswith("## ")]
    expected = ["Base", "Data", "Method", "Losses", "Proof", "Versions", "How to load", "How to serve"]
    assert [line[3:] for line in sections] == expected
    assert f"top-1 agreement {report.proof.top1_agreement:.2%}" in card.text
    assert "learning-rate multipliers" in card.text


def test_the_report_is_valid_json_and_complete(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    report = convert(make_run(llama_folder, eval=with_rows(tmp_path)), tmp_path / "merged")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads((tmp_path / "merged" / "merge_report.json").read_text(), parse_constant=refuse)
    assert content == json.loads(json.dumps(asdict(report)))
    assert content["versions"]["torch"] == torch.__version__
    assert tensors.MatrixUpdate(**content["updates"][0]) == report.updates[0]
