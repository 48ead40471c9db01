"""Tiny random models and their tokenizer: real architectures, small enough to load in milliseconds.

The sizes are odd on purpose: neither the matrices nor the vocabulary divide by 3, so that 3 ranks share nothing evenly.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from qvtune.data import IGNORE_INDEX
from qvtune.data.packing import PackedRow
from qvtune.model.families import FAMILIES

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["system user assistant Be kind", "What does it do in Python? It does what the name says.", "hello world " * 5]
VOCABULARY = 331
DECODERS = tuple(name for name, family in FAMILIES.items() if not family.is_encoder)
ENCODERS = tuple(name for name, family in FAMILIES.items() if family.is_encoder)
_FAMILY_OPTIONS: dict[str, dict[str, Any]] = {  # windows that are shorter than the tests' documents
    "mistral": {"sliding_window": 8},
    "gemma3_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "roberta": {"type_vocab_size": 1},
}


def four_bit_config(double_quant: bool = True) -> BitsAndBytesConfig:
    """As QLoRA has it, with all that is not quantized in float32."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the ChatML template that SmolLM2 uses; fewer tokens than ``VOCABULARY``."""
    backend = _byte_level_bpe("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def make_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokens with BERT's special tokens around a text, or a pair of texts, and their types."""
    special = ("[PAD]", "[CLS]", "[SEP]")
    backend = _byte_level_bpe(*special)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in special[1:]],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _byte_level_bpe(*special_tokens: str) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def make_model_folder(
    path: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.bfloat16,
    tie: bool = False,
    shards: int = 1,
    num_layers: int = 2,
    head_dim: int = 16,
    intermediate_size: int = 100,
    seed: int = 0,
    **options: Any,
) -> Path:
    """A Hugging Face model folder with tokenizer; everything in it is random, biases and norms too. Returns ``path``.

    ``shards`` > 1: that many safetensors files or a few more, with an index. ``options`` are further settings of the
    configuration. Encoders are saved as masked language models: with a prefix, a head and without a pooler.
    """
    tokenizer = make_encoder_tokenizer() if family in ENCODERS else make_tokenizer()
    settings = {
        "hidden_size": 64,
        "head_dim": head_dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": intermediate_size,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # attention that is far from uniform
        "tie_word_embeddings": tie,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(family, **settings | _FAMILY_OPTIONS.get(family, {}) | options)
    architecture = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = architecture.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # initialised to all zeros or all ones
                parameter += 0.1 * torch.randn_like(parameter)
        model.to(dtype)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(path, max_shard_size=num_bytes if shards == 1 else num_bytes // shards)
    tokenizer.save_pretrained(path)
    return path


def make_row(*document_lengths: int, seed: int = 0) -> PackedRow:
    """Random documents in one row; the first third of each (at least one token) has no loss."""
    generator = np.random.default_rng(seed)
    documents = [generator.integers(3, VOCABULARY, length, dtype=np.int32) for length in document_lengths]
    labels = [document.copy() for document in documents]
    for document in labels:
        document[: max(1, len(document) // 3)] = IGNORE_INDEX
    return PackedRow(np.concatenate(documents), np.concatenate(labels), np.array(document_lengths, dtype=np.int32))


def make_hub_cache(cache: Path, hub_id: str, revisions: Mapping[str, Path]) -> None:
    """A cache of the hub with the model ``hub_id``: branch or tag -> the folder that it is a copy of."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    for number, (name, folder) in enumerate(revisions.items(), start=1):
        commit = f"{number:040x}"
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
