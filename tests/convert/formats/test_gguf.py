"""``--format gguf``: read again by transformers' own reader and by llama.cpp, neither of which knows this writer."""

import io
import json
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer

from qvtune.convert.convert import convert
from qvtune.convert.formats import gguf_file, gguf_tokenizer
from qvtune.errors import ProofError, UserError
from tests.convert.conftest import MakeRun
from tests.support.tiny import CORPUS, make_model_folder

to_gguf = partial(convert, format="gguf")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEXT = "What does 12345 it's <|im_start|>user\n\n  Bé kind!!?\t\r\n"


def written(make_run: MakeRun, base: Path, tmp_path: Path, **settings: Any) -> tuple[Path, Path]:
    """GGUF and merged folder of the same run."""
    run = make_run(base, quantization="none", **settings)
    to_gguf(run, tmp_path / "out")
    convert(run, tmp_path / "merged")
    return tmp_path / "out", tmp_path / "merged"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tie": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),  # what its reader takes for granted
    ],
)
def test_transformers_own_reader_gets_equal_tensors(
    make_run: MakeRun, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    base = make_model_folder(tmp_path / "base", family, dtype=torch.float32, **options)
    out, merged = written(make_run, base, tmp_path)
    found: Any = AutoModelForCausalLM.from_pretrained(out, gguf_file=gguf_file.FILE, dtype=torch.float32)
    expected: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tensors = found.state_dict()
    assert tensors.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensors[name], tensor), name
    for setting in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size"):
        assert getattr(found.config, setting) == pytest.approx(getattr(expected.config, setting)), setting
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file=gguf_file.FILE)
    assert tokenizer(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(merged)(TEXT)["input_ids"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tie": True, "rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_llama_cpp_continues_as_transformers_does(
    make_run: MakeRun, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    base = make_model_folder(tmp_path / "base", family, dtype=torch.float32, **options)
    out, merged = written(make_run, base, tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer(TEXT * 2)["input_ids"]
    never = [0, 2]  # what ends a text: <|endoftext|>, <|im_end|>
    ids_1T = torch.tensor([ids])
    expected = model.generate(ids_1T, max_new_tokens=32, do_sample=False, suppress_tokens=never)[0, len(ids) :].tolist()
    num_read, tokens = continued(out / gguf_file.FILE, TEXT * 2)
    assert num_read == len(ids)
    assert tokens == expected


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_llama_cpp_reads_sentencepiece_as_its_own_library_does(
    make_run: MakeRun, tmp_path: Path, dummy_prefix: bool
) -> None:
    base = make_model_folder(tmp_path / "base", dtype=torch.float32)
    content = sentencepiece_model(dummy_prefix)
    for path in (*base.glob("tokenizer*"), base / "chat_template.jinja"):
        path.unlink()
    (base / "tokenizer.model").write_bytes(content)
    LlamaTokenizer.from_pretrained(base, add_bos_token=True).save_pretrained(base)
    (base / "tokenizer.model").write_bytes(content)
    out, merged = written(make_run, base, tmp_path)
    ids = [1, *SentencePieceProcessor(model_proto=content).encode(TEXT)]
    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False, suppress_tokens=[2])[0]
    assert continued(out / gguf_file.FILE, TEXT) == (len(ids), expected[len(ids) :].tolist())


def sentencepiece_model(dummy_prefix: bool) -> bytes:
    """Byte pairs with what Llama 2 and Mistral set; nothing is normalized."""
    stream = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=stream,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        minloglevel=2,
    )
    return stream.getvalue()


def continued(file: Path, text: str) -> tuple[int, list[int]]:
    """Tokens in ``text``, and 32 greedy ones behind it, by llama.cpp."""
    llama_cpp = pytest.importorskip("xllamacpp", reason="no xllamacpp, llama.cpp as a wheel: pip install xllamacpp")
    params = llama_cpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 256, 1, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = llama_cpp.Server(params)
    request = {"prompt": text, "n_predict": 32, "temperature": 0, "top_k": 1, "return_tokens": True, "ignore_eos": True}
    url = f"{server.listening_address}/completion"  # its Python functions leave out tokens that are parts of letters
    with urllib.request.urlopen(url, json.dumps(request).encode()) as answer:
        found = json.load(answer)
    return found["tokens_evaluated"], found["tokens"]


WORDS, REST = gguf_tokenizer._WORDS, gguf_tokenizer._REST


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("llama-bpe", pre_tokenizers.Split(Regex(WORDS + r"\p{N}{1,3}" + REST), "isolated")),
        ("qwen2", pre_tokenizers.Split(Regex(WORDS + r"\p{N}" + REST), "isolated")),
        ("smollm", pre_tokenizers.Digits(individual_digits=True)),
    ],
)
def test_llama_cpp_cuts_text_as_the_tokenizer_does(
    make_run: MakeRun, tmp_path: Path, name: str, first: pre_tokenizers.PreTokenizer
) -> None:
    base = make_model_folder(tmp_path / "base", dtype=torch.float32)
    path = base / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "smollm")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, last])
    tokenizer.save(str(path))
    content = json.loads(path.read_text())
    content["model"]["ignore_merges"] = name == "llama-bpe"
    path.write_text(json.dumps(content))
    out, merged = written(make_run, base, tmp_path)
    fields = GGUFReader(out / gguf_file.FILE).fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert fields["tokenizer.chat_template"].contents() == AutoTokenizer.from_pretrained(merged).chat_template
    assert continued(out / gguf_file.FILE, TEXT)[0] == len(AutoTokenizer.from_pretrained(merged)(TEXT)["input_ids"])


def test_sixteen_bits_and_a_window(make_run: MakeRun, tmp_path: Path) -> None:
    base = make_model_folder(tmp_path / "base", "mistral")
    report = to_gguf(make_run(base, dtype=torch.bfloat16), tmp_path / "out")
    assert report.dtype == "bfloat16"
    reader = GGUFReader(tmp_path / "out" / gguf_file.FILE)
    assert reader.fields["llama.context_length"].contents() == 8  # as far as the window reaches
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.attn_norm.weight"]) == ("BF16", "F32")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {gguf_file.FILE, "README.md", "merge_report.json"}


@pytest.mark.parametrize(
    ("family", "options", "found"),
    [
        ("gemma3_text", {}, "Gemma3ForCausalLM is not one of"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'dynamic'",
        ),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused_with_what_to_type(
    make_run: MakeRun, tmp_path: Path, family: str, options: dict[str, Any], found: str
) -> None:
    run = make_run(make_model_folder(tmp_path / "base", family, **options))
    with pytest.raises(UserError, match=rf"{found}.*convert_hf_to_gguf\.py DIR --outfile"):
        to_gguf(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_pre_tokenizer_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    base = make_model_folder(tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,2}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
    tokenizer.save(str(base / "tokenizer.json"))
    with pytest.raises(UserError, match=r"is not known here.*convert_hf_to_gguf"):
        to_gguf(make_run(base), tmp_path / "out")


def test_rows_in_the_wrong_order_are_found(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = gguf_file._pieces

    def reversed_rows(merger: Any, tensor: Any) -> Any:
        found = torch.cat(list(pieces(merger, tensor)))
        yield found.view(tensor.shape).flip(0).flatten() if "attn_k" in tensor.name else found

    monkeypatch.setattr(gguf_file, "_pieces", reversed_rows)
    with pytest.raises(ProofError):
        to_gguf(make_run(llama_folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
