"""A folder's tokenizer as llama.cpp wants it: which of the two kinds it knows, its tokens, and how text is cut first.

llama.cpp has the regular expressions that cut a text before byte pairs are merged in its own code, under names. A
tokenizer whose expressions are not among those below is refused: another name would give other tokens, silently.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from qvtune.errors import UserError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
_NORMALIZERS = {"qwen2": "NFC"}  # which llama.cpp leaves out: text that is not in NFC gets other tokens there
_SENTENCEPIECE_BPE = 2  # TrainerSpec.ModelType

Token = tuple[str, TokenType, float]


def add_tokenizer(writer: GGUFWriter, folder: Path, num_tokens: int, tokenizer: Any, ends: Sequence[int]) -> None:
    """Everything about ``folder``'s tokenizer; ``tokenizer`` is transformers' of the same, asked how it behaves.

    ``ends``: ids of the tokens that end an answer.

    Raises UserError where llama.cpp would give other tokens.
    """
    content = _tokenizer_json(folder)
    if content["model"].get("byte_fallback"):
        tokens = _sentencepiece(writer, folder)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(folder, content))
        writer.add_token_merges(
            [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
        )
        tokens = {index: (text, TokenType.NORMAL, 0.0) for text, index in content["model"]["vocab"].items()}
    for added in content["added_tokens"] or ():
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens.setdefault(added["id"], (added["content"], kind, 0.0))
        if tokens[added["id"]][1] == TokenType.NORMAL:
            tokens[added["id"]] = (added["content"], kind, tokens[added["id"]][2])
    if beyond := [index for index in tokens if index >= num_tokens]:
        raise UserError(f"{folder}: the tokenizer has {len(beyond)} tokens more than the model's {num_tokens}")
    listed = [tokens.get(index, (f"[PAD{index}]", TokenType.UNUSED, 0.0)) for index in range(num_tokens)]
    writer.add_token_list([text for text, _, _ in listed])
    writer.add_token_types([kind for _, kind, _ in listed])
    if content["model"].get("byte_fallback"):
        writer.add_token_scores([score for _, _, score in listed])
    _add_special(writer, tokenizer, ends)


def _tokenizer_json(folder: Path) -> Mapping[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: no tokenizer.json; {elsewhere(folder)}")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content["model"].get("type") != "BPE":
        raise UserError(f"{path}: is a {content['model'].get('type')}, not byte pairs; {elsewhere(folder)}")
    return content


def elsewhere(folder: Path | str) -> str:
    """What the user can type where a faithful file cannot be written here."""
    return (
        "GGUF cannot be written faithfully here. Convert with --format merged, then with llama.cpp: "
        "`python convert_hf_to_gguf.py DIR --outfile model.gguf` (DIR = that output)"
    )


def _pre_tokenizer(folder: Path, content: Mapping[str, Any]) -> str:
    """llama.cpp's name. Raises UserError where it has none that is known here."""
    name = _name_of(content["pre_tokenizer"] or {})
    normalizer = (content["normalizer"] or {}).get("type")
    ignores_merges = bool(content["model"].get("ignore_merges"))
    if name is None or normalizer not in (None, _NORMALIZERS.get(name)) or ignores_merges != (name == "llama-bpe"):
        found = {"pre_tokenizer": content["pre_tokenizer"], "normalizer": normalizer, "ignore_merges": ignores_merges}
        raise UserError(f"{folder}/tokenizer.json: {json.dumps(found)} is not known here; {elsewhere(folder)}")
    return name


def _name_of(pre_tokenizer: Mapping[str, Any]) -> str | None:
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *before, last = parts
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    uses_regex = last.get("use_regex", True)
    if not before:
        return "gpt-2" if uses_regex else None
    if len(before) == 1 and uses_regex and before[0] == {"type": "Digits", "individual_digits": True}:
        return "smollm"
    if len(before) == 1 and not uses_regex and before[0].get("type") == "Split":
        split = before[0]
        whole = split.get("behavior") == "Isolated" and not split.get("invert")
        return _SPLITS.get(split["pattern"].get("Regex", "")) if whole else None
    return None


def _sentencepiece(writer: GGUFWriter, folder: Path) -> dict[int, Token]:
    """Pieces and scores of tokenizer.model, which tokenizer.json does not have."""
    from transformers.convert_slow_tokenizer import import_protobuf

    path = folder / "tokenizer.model"
    if not path.is_file():
        raise UserError(f"{folder}: a SentencePiece tokenizer without tokenizer.model; copy it there from the base")
    model = import_protobuf().ModelProto()
    model.ParseFromString(path.read_bytes())
    if problems := list(_sentencepiece_problems(model)):
        raise UserError([f"{path}: {problem}; {elsewhere(folder)}" for problem in problems])
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    return {index: (piece.piece, TokenType(piece.type), piece.score) for index, piece in enumerate(model.pieces)}


def _sentencepiece_problems(model: Any) -> Iterator[str]:
    if model.trainer_spec.model_type != _SENTENCEPIECE_BPE:
        yield "does not merge byte pairs"
    if model.normalizer_spec.precompiled_charsmap:
        yield f"normalizes text ({model.normalizer_spec.name})"
    if model.normalizer_spec.remove_extra_whitespaces:
        yield "removes white space"


def _add_special(writer: GGUFWriter, tokenizer: Any, ends: Sequence[int]) -> None:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    for name, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    if others := [index for index in ends if index != ids["eos"]]:
        writer.add_eot_token_id(others[0])
    plain = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids["bos"] is not None and plain[0] == ids["bos"])
    writer.add_add_eos_token(ids["eos"] is not None and plain[-1] == ids["eos"])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())
