"""What a server needs: tokenizer, chat template and ends of answers as in training, and the line that starts vLLM."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qvtune.convert.convert import convert
from qvtune.convert.formats import four_bit
from tests.convert.conftest import MakeRun
from tests.convert.foreign import save_adapter
from tests.support.tiny import CHATML, make_model_folder

QUESTION = [{"role": "user", "content": "hello"}]


def base_whose_texts_end_otherwise(folder: Path, *, generation_config: bool = True) -> Path:
    """As Qwen2.5's base models: texts end with <|endoftext|>, the turns of the chat template with <|im_end|>."""
    base = make_model_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"eos_token_id": tokenizer.eos_token_id}))
    (base / "generation_config.json").unlink(missing_ok=True)
    if generation_config:
        GenerationConfig(eos_token_id=tokenizer.eos_token_id, temperature=0.7, do_sample=True).save_pretrained(base)
    return base


@pytest.mark.parametrize("format", ["merged", "adapter", "bnb-4bit"])
@pytest.mark.parametrize("generation_config", [True, False])
def test_a_server_stops_where_answers_were_trained_to_end(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any, generation_config: bool
) -> None:
    monkeypatch.setattr(four_bit, "QUANTIZED", four_bit.Limits(0.2, None, 3.0))  # 4 bits move a random model far
    base = base_whose_texts_end_otherwise(tmp_path / "base", generation_config=generation_config)
    convert(make_run(base), tmp_path / "out", format=format)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert settings.eos_token_id == ends
    assert settings.temperature == (0.7 if generation_config else None)
    expected = AutoTokenizer.from_pretrained(base).apply_chat_template(QUESTION, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True) == expected


def test_settings_that_name_all_ends_stay_as_they_are(make_run: MakeRun, tmp_path: Path) -> None:
    base = make_model_folder(tmp_path / "base")
    content = '{"eos_token_id":  [2],\n\n"temperature": 0.3}'
    (base / "generation_config.json").write_text(content)
    convert(make_run(base), tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == content


def test_an_end_that_the_base_names_comes_first(make_run: MakeRun, tmp_path: Path) -> None:
    """The tokens that training ends with are added to the base's, and transformers stops at either."""
    base = make_model_folder(tmp_path / "base", dtype=torch.float32)
    (base / "generation_config.json").write_text('{"eos_token_id": 7}')
    convert(make_run(base), tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [7, AutoTokenizer.from_pretrained(base).eos_token_id]


@pytest.mark.parametrize("format", ["merged", "adapter"])
def test_the_tokenizer_that_an_adapter_was_saved_with_is_taken(tmp_path: Path, format: Any) -> None:
    base = make_model_folder(tmp_path / "base", dtype=torch.float32)
    assert (base / "chat_template.jinja").is_file()
    adapter = save_adapter(base, tmp_path / "adapter", AutoModelForCausalLM, r=4, target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML.replace("Be kind", "Be brief")
    tokenizer.save_pretrained(adapter, save_jinja_files=False)  # as before transformers 4.52: in tokenizer_config.json
    assert not (adapter / "chat_template.jinja").exists()
    convert(adapter, tmp_path / "out", format=format)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.chat_template == tokenizer.chat_template
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def serve_line(folder: Path) -> list[str]:
    """The words of the card's command."""
    section = (folder / "README.md").read_text().partition("## How to serve\n\n```\n")[2]
    return shlex.split(section.partition("\n```")[0])


def test_the_card_says_how_vllm_serves_the_merged_folder(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    convert(make_run(llama_folder, dtype=torch.bfloat16), tmp_path / "out")
    assert serve_line(tmp_path / "out") == ["vllm", "serve", "out", "--dtype", "bfloat16"]


@pytest.mark.parametrize(("rank", "allowed"), [(1, "1"), (4, "8"), (8, "8"), (20, "32")])
def test_the_card_says_how_vllm_serves_the_adapter(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, rank: int, allowed: str
) -> None:
    run = make_run(llama_folder, dtype=torch.bfloat16, adapter={"rank": rank, "alpha": 6})
    convert(run, tmp_path / "out", format="adapter")
    words = serve_line(tmp_path / "out")
    assert words[:3] == ["vllm", "serve", str(llama_folder)]
    assert words[words.index("--max-lora-rank") + 1] == allowed
    assert words[words.index("--lora-modules") + 1] == "out=out"
    assert words[words.index("--generation-config") + 1] == words[words.index("--tokenizer") + 1] == "out"
    assert "--enable-lora" in words and words[-2:] == ["--quantization", "bitsandbytes"]
    convert(run, tmp_path / "plain", format="adapter", base_weights="original")
    assert "--quantization" not in serve_line(tmp_path / "plain")


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"rank": 4, "method": "dora"}, "it is DoRA"),
        ({"projections": ["v"], "method": "ia3"}, r"it is (IA)^3, not LoRA"),
    ],
)
def test_the_card_says_what_vllm_does_not_serve(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, adapter: dict[str, Any], reason: str
) -> None:
    convert(make_run(llama_folder, adapter=adapter), tmp_path / "out", format="adapter")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"vLLM does not serve this adapter: {reason}. Serve what `--format merged` writes." in card
