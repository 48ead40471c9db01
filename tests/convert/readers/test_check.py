"""``--check-with``: readers that compute what was written pass, all others are noticed, and nothing merged is lost."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from qvtune.convert.convert import convert
from qvtune.convert.formats import four_bit
from qvtune.convert.readers import check, process, require_reader
from qvtune.convert.readers.process import Answer, Request
from qvtune.errors import UserError
from tests.convert.conftest import MakeRun
from tests.convert.test_classifiers import CLASSES, SCORES
from tests.convert.test_classifiers import make_run as make_classifier
from tests.support.tiny import make_model_folder

CONVERT = Path(__file__).parents[3] / "launch" / "convert.py"
# A module named vllm, as far as the check uses it: transformers and PEFT compute what its engine is asked for, but for
# "scaling": by how much it weighs the adapter. It notes its options beside itself.
STAND_IN = """
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

__version__ = "0.0-of-a-test"
BESIDE = Path(__file__).parent

class SamplingParams:
    def __init__(self, temperature, max_tokens):
        assert temperature == 0
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, model, dtype, enable_lora=False, **options):
        (BESIDE / "options.json").write_text(json.dumps({"enable_lora": enable_lora, **options}))
        if model.endswith("too-large"):
            raise ValueError("No available memory for the cache blocks")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.settings = options.get("generation_config", model)

    def generate(self, prompts, params, lora_request):
        model = self.model
        if lora_request is not None:
            model = PeftModel.from_pretrained(model, lora_request.path)
            for module in model.modules():
                if isinstance(getattr(module, "scaling", None), dict):
                    module.scaling["default"] *= SCALING
        model.generation_config = GenerationConfig.from_pretrained(self.settings)
        outputs = []
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            new = model.generate(input_ids=ids, max_new_tokens=params.max_tokens, do_sample=False, pad_token_id=0)
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=new[0, ids.shape[1]:].tolist())]))
        return outputs
"""
LORA_REQUEST = """
from types import SimpleNamespace

def LoRARequest(name, number, path):
    assert number > 0
    return SimpleNamespace(path=path)
"""


def in_a_fork(request: Request) -> Answer:
    """What ``check.ask`` does, without the seconds in which a new process imports transformers."""
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            try:
                module = importlib.import_module(f"qvtune.convert.readers.{process.MODULES[request.reader]}")
                Path(folder, "answer.json").write_text(json.dumps(asdict(module.read(request))))
            except Exception:
                traceback.print_exc()
                raise
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return Answer(**json.loads(Path(folder, "answer.json").read_text()))


@pytest.fixture
def _forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ask", in_a_fork)


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs the stand-in; ``vllm(scaling)`` with another weight of adapters. Returns its folder."""

    def install(scaling: float = 1.0) -> Path:
        package = tmp_path / "site" / "vllm"
        (package / "lora").mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(STAND_IN.replace("SCALING", str(scaling)))
        (package / "lora" / "__init__.py").touch()
        (package / "lora" / "request.py").write_text(LORA_REQUEST)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.syspath_prepend(package.parent)
        return package

    return install


def test_a_process_of_its_own_reads_a_merged_folder(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    report = convert(make_run(llama_folder), tmp_path / "out", check_with="transformers")
    assert report.check is not None and (report.check.dtype, report.check.passed) == ("float32", True)


@pytest.mark.usefixtures("_forks")
@pytest.mark.parametrize(
    ("format", "reader"),
    [("merged", "transformers"), ("bnb-4bit", "transformers"), ("adapter", "transformers"), ("gguf", "llama.cpp")],
)
def test_readers_that_are_installed_continue_as_the_written_weights_do(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any, reader: Any
) -> None:
    if reader == "llama.cpp":
        pytest.importorskip("xllamacpp", reason="no xllamacpp, llama.cpp as a wheel: pip install xllamacpp")
    monkeypatch.setattr(four_bit, "QUANTIZED", four_bit.Limits(0.2, None, 3.0))  # 4 bits move a random model far
    base = make_model_folder(tmp_path / "base", dtype=torch.float32, intermediate_size=128)
    report = convert(make_run(base), tmp_path / "out", format=format, check_with=reader)
    assert report.check is not None and report.check.passed
    assert [one.tokens for one in report.check.prompts] == [check.MAX_NEW_TOKENS] * 6
    noted = json.loads((tmp_path / "out" / "merge_report.json").read_text())["check"]
    assert (noted["reader"], len(noted["prompts"])) == (reader, 6)
    assert (
        f"- {reader} {noted['version']} in {noted['dtype']}: 192 greedy tokens"
        in (tmp_path / "out" / "README.md").read_text()
    )


@pytest.mark.usefixtures("_forks")
def test_vllm_reads_merged_folder_and_adapter_with_the_options_of_the_card(
    make_run: MakeRun, llama_fp32_folder: Path, tmp_path: Path, vllm: Any
) -> None:
    package = vllm()
    run = make_run(llama_fp32_folder)
    assert convert(run, tmp_path / "merged", check_with="vllm").check is not None
    assert json.loads((package / "options.json").read_text()) == {"enable_lora": False}
    report = convert(run, tmp_path / "adapter", format="adapter", base_weights="original", check_with="vllm")
    assert report.check is not None and report.check.version == "0.0-of-a-test"
    options = json.loads((package / "options.json").read_text())
    assert (options["enable_lora"], options["max_lora_rank"]) == (True, 8)
    assert options["tokenizer"] == options["generation_config"]
    assert options["tokenizer"].endswith(".adapter.partial/model")


@pytest.mark.usefixtures("_forks")
def test_another_weight_of_the_adapter_is_noticed_and_the_merge_is_kept(
    make_run: MakeRun, llama_fp32_folder: Path, tmp_path: Path, vllm: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm(scaling=0.9)
    run = make_run(llama_fp32_folder, quantization="none")
    with pytest.raises(check.ReaderError, match=r"vllm 0\.0-of-a-test does not compute what was written"):
        convert(run, tmp_path / "out", format="adapter", check_with="vllm")
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").exists()
    shown = " ".join(capsys.readouterr().out.split())
    assert "instead of" in shown and "higher; allowed 0.001" in shown
    vllm()
    assert convert(run, tmp_path / "out", format="adapter", check_with="vllm").proof.passed
    assert (tmp_path / "out" / "README.md").exists() and not (tmp_path / ".out.partial").exists()


def test_a_reader_that_fails_is_shown_and_the_merge_is_kept(
    make_run: MakeRun, tmp_path: Path, vllm: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm()
    run = make_run(make_model_folder(tmp_path / "too-large"))
    with pytest.raises(check.ReaderError, match=r"vllm failed with exit code 1, .* the same command resumes"):
        convert(run, tmp_path / "out", format="adapter", check_with="vllm")
    assert "No available memory for the cache blocks" in capsys.readouterr().out
    assert check.ReaderError.exit_code == 1
    assert convert(run, tmp_path / "out", format="adapter").check is None


@pytest.mark.usefixtures("_forks")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_is_compared_by_the_classes_of_transformers(tmp_path: Path, vllm: Any, family: str) -> None:
    base = make_model_folder(tmp_path / family, family, dtype=torch.float32)
    make_classifier(tmp_path, base, CLASSES)
    vllm()
    with pytest.raises(UserError, match=r"--check-with vllm: compares tokens, which a classifier has not"):
        convert(tmp_path / "run", tmp_path / "out", check_with="vllm")
    assert not (tmp_path / ".out.partial").exists()
    report = convert(tmp_path / "run", tmp_path / "out", check_with="transformers")
    assert report.check is not None and [one.tokens for one in report.check.prompts] == [1] * 6


def test_a_score_has_no_choice_to_compare(tmp_path: Path) -> None:
    make_classifier(tmp_path, make_model_folder(tmp_path / "bert", "bert", dtype=torch.float32), SCORES)
    with pytest.raises(UserError, match="a score is none; the proof compares the scores"):
        convert(tmp_path / "run", tmp_path / "out", check_with="transformers")


def test_an_adapter_that_vllm_does_not_serve_is_refused_before_anything_is_written(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, vllm: Any
) -> None:
    vllm()
    run = make_run(llama_folder, adapter={"rank": 4, "method": "dora"})
    with pytest.raises(UserError, match=r"--check-with: vLLM does not serve this adapter: it is DoRA\. Serve what"):
        convert(run, tmp_path / "out", format="adapter", check_with="vllm")
    assert not list(tmp_path.glob(".out*"))


def answered(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let the reader's tokens be changed on their way: ``change`` gets those of a prompt."""

    def changed(request: Request) -> Answer:
        answer = in_a_fork(request)
        return Answer([change(list(tokens)) for tokens in answer.tokens], answer.dtype, answer.version)

    monkeypatch.setattr(check, "ask", changed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tokens: [*tokens[:-1], (tokens[-1] + 1) % 300], "token 32 is"),
        (lambda tokens: tokens[:5], "stops after 5 tokens, where no answer ends"),
        (lambda tokens: [], "stops after 0 tokens, where no answer ends"),
    ],
)
def test_what_a_reader_does_otherwise_is_said(
    make_run: MakeRun,
    llama_fp32_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Any,
    said: str,
) -> None:
    answered(monkeypatch, change)
    with pytest.raises(check.ReaderError):
        convert(make_run(llama_fp32_folder), tmp_path / "out", check_with="transformers")
    assert capsys.readouterr().out.count(said) == 6


def test_a_reader_must_stop_at_the_end_of_an_answer(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does where the folder says so; one that does not know the ends goes on."""
    base = make_model_folder(tmp_path / "base", dtype=torch.float32)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(3, 200))}))
    run = make_run(base, quantization="none")
    monkeypatch.setattr(check, "ask", in_a_fork)
    stopping = convert(run, tmp_path / "stopping", check_with="transformers")
    assert stopping.check is not None and min(one.tokens for one in stopping.check.prompts) < check.MAX_NEW_TOKENS

    def without_ends(request: Request) -> Answer:
        (tmp_path / ".going-on.partial" / "model" / "generation_config.json").write_text("{}")
        return in_a_fork(request)

    monkeypatch.setattr(check, "ask", without_ends)
    with pytest.raises(check.ReaderError):
        convert(run, tmp_path / "going-on", check_with="transformers")
    assert "which ends an answer" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("reader", "format", "said"),
    [
        ("vllm", "merged", "vllm is not installed here: `pip install vllm`, or leave the option out"),
        ("llama.cpp", "merged", "llama.cpp does not read --format merged; it reads gguf"),
        ("transformers", "gguf", "transformers does not read --format gguf; it reads merged, adapter, bnb-4bit"),
    ],
)
def test_a_reader_that_cannot_be_is_refused_before_torch_is_imported(
    tmp_path: Path, reader: Any, format: Any, said: str
) -> None:
    if reader == "vllm":
        with pytest.raises(UserError, match="is not installed here"):
            require_reader(reader, format)
    words = [
        sys.executable,
        "-X",
        "importtime",
        str(CONVERT),
        str(tmp_path / "none"),
        "--output",
        str(tmp_path / "out"),
    ]
    words += ["--format", format, "--check-with", reader]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 2, done.stderr[-2000:]
    assert "none: no checkpoint" in errors[0]
    assert errors[1] == f"error: --check-with: {said}"
    assert not any(line.endswith("| torch") for line in done.stderr.splitlines())
