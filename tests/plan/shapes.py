"""Published shapes of models, as folders that have a config.json and nothing else."""

import json
from pathlib import Path
from typing import Any

_LLAMA_3 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
_ROBERTA_BASE = {
    "model_type": "roberta",
    "architectures": ["RobertaForMaskedLM"],
    "vocab_size": 50265,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
}


def _llama(
    hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int
) -> dict[str, Any]:
    return _LLAMA_3 | {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
    }


SHAPES = {
    "llama3_8b": _llama(4096, 14336, 32, 32),
    "llama3_70b": _llama(8192, 28672, 80, 64),
    "llama3_405b": _llama(16384, 53248, 126, 128),
    "roberta_base": _ROBERTA_BASE,
}


def make_config_folder(path: Path, name: str) -> Path:
    """``path`` with the configuration of the model ``name`` of ``SHAPES``."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SHAPES[name]))
    return path
