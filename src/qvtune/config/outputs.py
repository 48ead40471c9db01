"""Choices and defaults of the commands that write models; here so that their --help needs no torch."""

from typing import Literal

NF4_SHARD_BYTES = 1_000_000_000  # per file of launch/quantize.py
MERGED_SHARD_BYTES = 5_000_000_000  # per file of launch/convert.py

FormatName = Literal["merged", "adapter", "bnb-4bit", "gguf"]
ReaderName = Literal["transformers", "vllm", "llama.cpp"]
BaseChoice = Literal["dequantized", "original"]
DtypeChoice = Literal["auto", "bf16", "fp16", "fp32", "bfloat16", "float16", "float32"]
