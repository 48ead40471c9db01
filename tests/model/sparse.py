"""Checkpoints with real names, shapes and file sizes, and holes instead of weights: a few kilobytes on the disk."""

import json
import math
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[int, ...]]

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "rms_norm_eps": 1e-5}
_LLAMA_3_1 = {
    **_LLAMA,
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SMOLLM2_135M = {
    **_LLAMA,
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA_3_1_8B = {
    **_LLAMA_3_1,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_3_1_70B = {
    **_LLAMA_3_1,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA_3_1_405B = {
    **_LLAMA_3_1,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
BYTES_PER_WEIGHT = 2  # bfloat16


def llama_shapes(config: dict[str, Any]) -> Shapes:
    """Tensor name -> shape, as the hub's checkpoints have them."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, intermediate),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (kv, hidden),
    }
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def num_weights(config: dict[str, Any]) -> int:
    """Weights of the whole model, tied ones once."""
    return sum(math.prod(shape) for shape in llama_shapes(config).values())


def make_sparse_folder(folder: Path, config: dict[str, Any], file_bytes: int = 5_000_000_000) -> Path:
    """A model folder whose weights read as zeros: files of at most ``file_bytes`` (or one tensor), and their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    files: list[Shapes] = [{}]
    size = 0
    for name, shape in llama_shapes(config).items():
        needed = math.prod(shape) * BYTES_PER_WEIGHT
        if files[-1] and size + needed > file_bytes:
            files.append({})
            size = 0
        files[-1][name] = shape
        size += needed
    weight_map = {}
    for number, shapes in enumerate(files, start=1):
        file = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_holes(file, shapes)
        weight_map |= dict.fromkeys(shapes, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _write_holes(file: Path, shapes: Shapes) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * BYTES_PER_WEIGHT
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + end)
