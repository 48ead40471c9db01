"""``gguf``: one file for llama.cpp and what is built on it, in F32, F16 or BF16, for models of LLaMA's kind.

Layout as llama.cpp's own convert_hf_to_gguf.py gives it: tensors of one dimension in F32, the rows of q and k in the
order of its rotary embedding for the architecture ``llama``. Tensors are written while they are computed; the largest
one that has to be reordered is in memory. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
)

from qvtune.config.outputs import BaseChoice, ReaderName
from qvtune.convert.conversion import Conversion
from qvtune.convert.formats import merged
from qvtune.convert.formats.gguf_tokenizer import add_tokenizer, elsewhere
from qvtune.convert.merge.tensors import Merger
from qvtune.convert.merge.write import Written, require_base
from qvtune.convert.proof.proof import Limits
from qvtune.convert.proof.views import ModelView, ModelViews, model_views
from qvtune.convert.serving import end_tokens
from qvtune.errors import UserError
from qvtune.model.fingerprint import ContentChecksums
from qvtune.storage.partial import PartialOutput

PREFERS: BaseChoice | None = None
FILE = "model.gguf"
_ARCHITECTURES = {
    "LlamaForCausalLM": MODEL_ARCH.LLAMA,
    "MistralForCausalLM": MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
}
_TYPES = {
    torch.float32: (GGMLQuantizationType.F32, np.float32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, np.float16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, np.uint16, LlamaFileType.MOSTLY_BF16),
}
_PAGE = 2**22  # elements written at a time


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: its name in the model and there, and the heads whose rows change places (0: none)."""

    source: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_heads: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Stream:
    """What ``GGUFWriter`` takes for an array."""

    nbytes: int
    pieces: Iterator[torch.Tensor]

    def tofile(self, file: IO[bytes]) -> None:
        """Write all of it."""
        for piece in self.pieces:
            file.write(piece.contiguous().view(torch.uint8).numpy().data)


def require(conversion: Conversion) -> None:
    """Raises UserError, with what to type instead, for all that llama.cpp would compute differently."""
    config, problems = _config(conversion), []
    architecture = (config.architectures or ["none"])[0]
    if architecture not in _ARCHITECTURES:
        problems.append(f"{architecture} is not one of {', '.join(_ARCHITECTURES)}")
    else:
        rope = config.rope_parameters
        if rope["rope_type"] not in ("default", "linear", "llama3"):
            problems.append(f"rope_type {rope['rope_type']!r} is not default, linear or llama3")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            problems.append("partial_rotary_factor is not 1")
        if config.hidden_act != "silu":
            problems.append(f"hidden_act {config.hidden_act!r} is not silu")
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()) and config.model_type != "mistral":
            problems.append("some layers see a window only")
    if problems:
        raise UserError([f"--format gguf: {'; '.join(problems)}. {elsewhere(conversion.base.folder)}"])
    _metadata(GGUFWriter(None, "llama"), conversion)
    _tensors(conversion)


def write(partial: PartialOutput, conversion: Conversion, max_shard_bytes: int, num_threads: int) -> Written:
    """As ``OutputFormat``; a start that was cut off begins anew, since it is one file."""
    checksums = ContentChecksums(conversion.base.weights)
    merger, tensors = Merger(conversion.base, conversion.adapter, conversion.dtype, checksums), _tensors(conversion)
    writer = GGUFWriter(partial.folder / FILE, _architecture(conversion))
    _metadata(writer, conversion)
    for tensor in tensors:
        kind, array_dtype, _ = _TYPES[tensor.dtype]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(array_dtype), tensor.num_bytes, raw_dtype=kind)
    factors = _rope_factors(_config(conversion))
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_Stream(tensor.num_bytes, _pieces(merger, tensor)))  # type: ignore[arg-type]
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()
    require_base(conversion, checksums)
    kinds = {tensor.source: merger.kind(tensor.source) for tensor in tensors}
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    return Written([FILE], num_bytes, kinds, list(merger.updates.values()))


def views(conversion: Conversion, folder: Path) -> ModelViews:
    """As ``OutputFormat``; the file's tensors under the model's names and with rows in its order."""
    stored = {tensor.name: tensor for tensor in GGUFReader(folder / FILE).tensors}
    tensors = {tensor.source: tensor for tensor in _tensors(conversion)}

    def read(name: str, first: int, last: int | None) -> torch.Tensor:
        tensor = tensors[name]
        raw = torch.from_numpy(np.array(stored[tensor.name].data)).view(tensor.dtype).view(tensor.shape)
        if tensor.num_heads:
            half = tensor.shape[0] // tensor.num_heads // 2
            raw = raw.reshape(tensor.num_heads, half, 2, -1).transpose(1, 2).reshape(tensor.shape)
        return raw[first:last]

    return model_views(conversion, ModelView(tensors.keys(), read))


def limits(conversion: Conversion) -> Limits:
    """Those of a merged folder: the same weights."""
    return merged.limits(conversion)


def how_to_load(conversion: Conversion, title: str) -> str:
    """As ``OutputFormat``."""
    return f"```\nllama-cli -m {title}/{FILE}\n```"


def how_to_serve(conversion: Conversion, title: str) -> str:
    """As ``OutputFormat``."""
    return f"```\nllama-server -m {title}/{FILE}\n```"


def arguments(reader: ReaderName, conversion: Conversion, folder: str) -> dict[str, Any]:
    """As ``OutputFormat``."""
    return {"file": f"{folder}/{FILE}", "dtype": str(conversion.dtype).removeprefix("torch.")}


def _config(conversion: Conversion) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(conversion.base.folder, trust_remote_code=conversion.model.trust_remote_code)
    config.update(dict(conversion.settings))
    return config


def _architecture(conversion: Conversion) -> str:
    return "llama" if _arch(conversion) == MODEL_ARCH.LLAMA else _config(conversion).model_type


def _arch(conversion: Conversion) -> MODEL_ARCH:
    return _ARCHITECTURES[_config(conversion).architectures[0]]


def _tensors(conversion: Conversion) -> list[_Tensor]:
    config, arch = _config(conversion), _arch(conversion)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found, unknown = [], []
    for plan in Merger(conversion.base, conversion.adapter, conversion.dtype).plan():
        tied_copy = plan.name == "lm_head.weight" and config.tie_word_embeddings
        if tied_copy or plan.name.endswith("rotary_emb.inv_freq"):
            continue
        name = names.get_name(plan.name, try_suffixes=(".weight", ".bias"))
        dtype = torch.float32 if len(plan.shape) == 1 else plan.dtype
        if name is None or dtype not in _TYPES:
            unknown.append(f"{plan.name} ({plan.dtype})")
            continue
        num_heads = heads.get(plan.name.split(".")[-2], 0) if arch == MODEL_ARCH.LLAMA else 0
        found.append(_Tensor(plan.name, name, plan.shape, dtype, num_heads))
    if unknown:
        raise UserError(f"--format gguf: no place for {', '.join(unknown[:5])}. {elsewhere(conversion.base.folder)}")
    return found


def _pieces(merger: Merger, tensor: _Tensor) -> Iterator[torch.Tensor]:
    pieces = merger.pieces(tensor.source)
    if not tensor.num_heads:
        yield from (piece.to(tensor.dtype) for piece in pieces)
        return
    whole = torch.cat(list(pieces)).to(tensor.dtype)
    half = tensor.shape[0] // tensor.num_heads // 2  # from [first halves, second halves] to pairs, head by head
    yield whole.view(tensor.num_heads, 2, half, -1).transpose(1, 2).flatten()


def _metadata(writer: GGUFWriter, conversion: Conversion) -> None:
    config = _config(conversion)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    writer.add_name(Path(conversion.model.name_or_path).name)
    writer.add_file_type(_TYPES[conversion.dtype][2])
    # llama.cpp has no window for this architecture: as far as it reaches, both are the same.
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    folder, ends = conversion.base.folder, end_tokens(conversion)
    add_tokenizer(writer, folder, config.vocab_size, conversion.tokenizer, ends)


def _rope_factors(config: Any) -> "np.ndarray[Any, np.dtype[np.float32]] | None":
    """Llama 3.1's scaling as llama.cpp has it: what each of head_dim / 2 frequencies is divided by."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = rope["original_max_position_embeddings"] / (2 * math.pi) * rope["rope_theta"] ** -exponents
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: np.ndarray[Any, np.dtype[np.float32]] = (1 / ((1 - smooth) / factor + smooth)).float().numpy()
    return factors
