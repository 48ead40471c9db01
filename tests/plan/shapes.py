"""Published shapes of models, as folders that have a config.json and nothing else."""

import json
from pathlib import Path

_LLAMA_3 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
SHAPES = {
    "llama3_8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama3_70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "llama3_405b": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
}


def make_config_folder(path: Path, name: str) -> Path:
    """``path`` with the configuration of the model ``name`` of ``SHAPES``."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(_LLAMA_3 | SHAPES[name]))
    return path
