"""What adapter_config.json promises, and what of it cannot be merged."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from qvtune.config.adapter import lora_scale

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # what PEFT calls its files
HEAD_TASKS = {  # task type -> what transformers calls a model with that head
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_REASONS = {  # of PEFT 0.21's LoRA: everything that makes a merged matrix something else, or impossible
    "alora_invocation_tokens": "it acts on the tokens after an invocation only, which no merged matrix can",
    "arrow_config": "it chooses among adapters token by token, which no merged matrix can",
    "kasa_config": "it adapts a truncated base",
    "layer_replication": "it repeats layers of the base, which it was then trained on",
    "lora_bias": "its factors have biases",
    "megatron_config": "its layers are Megatron's",
    "monteclora_config": "its factors are random variables",
    "target_parameters": "it adapts parameters without a module of their own (experts)",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "its inputs are pooled in groups",
    "velora_config": "it is a variant that has not been compared with PEFT's merge",
}
# Used here, or without effect on the merged matrices.
_KNOWN = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode"),
    *("init_lora_weights", "lora_dropout", "lora_ga_config", "loftq_config", "megatron_core", "peft_type"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
    *("alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform"),
    *("lora_alpha", "modules_to_save", "r", "rank_pattern", "target_modules", "trainable_token_indices"),
    *("use_dora", "use_rslora"),
    *("feedforward_modules", "init_ia3_weights"),  # of (IA)^3
    "enable_lora",  # of the first versions, where it was null
    "merge_weights",
}
# Initialisations that also changed the base: only their own loader can do that again.
_BASE_CHANGED = re.compile(r"(pissa|olora|corda|lora_ga|loftq)")


@dataclass(frozen=True)
class PeftConfig:
    """adapter_config.json of a LoRA or an (IA)^3; ``path`` for messages."""

    path: Path
    values: Mapping[str, Any]

    def problems(self) -> Iterator[str]:
        """Everything that cannot be merged, with the reason."""
        if (kind := self.values.get("peft_type")) not in ("LORA", "IA3"):
            yield f"{self.path}: peft_type is {kind!r}; only LORA (with rsLoRA and DoRA) and IA3 can be merged"
            return
        if self.is_ia3 and self.values.get("fan_in_fan_out"):
            yield f"{self.path}: fan_in_fan_out with IA3: matrices stored as [in, out] can be merged of LORA only"
        for key, value in self.values.items():
            if value and key not in _KNOWN:
                yield f"{self.path}: {key} is {value!r}: {_REASONS.get(key, 'unknown')}; cannot be merged"
        if _BASE_CHANGED.match(initial := str(self.values.get("init_lora_weights", True)).lower()):
            yield (
                f"{self.path}: init_lora_weights is {initial!r}, which changed the base before training; save the "
                "adapter with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            )
        if self.bias not in ("none", "all", "lora_only"):
            yield f"{self.path}: bias is {self.bias!r}; allowed: none, all, lora_only"
        for key in () if self.is_ia3 else ("r", "lora_alpha"):
            if not isinstance(self.values.get(key), int | float):
                yield f"{self.path}: {key} is {self.values.get(key)!r}; must be a number"

    @property
    def is_ia3(self) -> bool:
        """Whether vectors were trained, not factors."""
        return bool(self.values.get("peft_type") == "IA3")

    @property
    def bias(self) -> Literal["none", "all", "lora_only"]:
        """Which biases were trained."""
        chosen: Literal["none", "all", "lora_only"] = self.values.get("bias", "none")
        return chosen

    @property
    def modules_to_save(self) -> list[str]:
        """Ends of paths of modules that were trained themselves."""
        return list(self.values.get("modules_to_save") or ())

    def get(self, key: str) -> Any:
        """A setting that may be missing (older versions)."""
        return self.values.get(key)

    def rank(self, module: str) -> int:
        """Rank of a module's factors."""
        rank: int = self._of_pattern("rank_pattern", module, self.values["r"])
        return rank

    def scaling(self, module: str) -> float:
        """What a module's update B A is multiplied with."""
        rank, alpha = self.rank(module), float(self._of_pattern("alpha_pattern", module, self.values["lora_alpha"]))
        return lora_scale(alpha, rank, is_rslora=bool(self.values.get("use_rslora")))

    def _of_pattern(self, key: str, module: str, default: Any) -> Any:
        pattern = self.values.get(key)
        if not pattern:
            return default
        from peft.utils.other import get_pattern_key

        return pattern.get(get_pattern_key(list(pattern), module), default)

    def targets(self, module: str) -> bool | None:
        """Whether a module is one that PEFT adapts; None where the configuration alone does not tell (all-linear)."""
        defaults = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"))
        targets = self.values.get("target_modules")
        if isinstance(targets, list) and not any(self.values.get(key) for key in defaults):
            # The ordinary case, without the seconds that PEFT takes to import.
            return any(module == target or module.endswith(f".{target}") for target in targets)
        from peft.tuners.tuners_utils import check_target_module_exists

        config = SimpleNamespace(**defaults | {"target_modules": None} | dict(self.values))
        if config.target_modules in (None, "all-linear"):
            return None
        return bool(check_target_module_exists(config, module))

    def saves(self, name: str) -> bool:
        """Whether a tensor belongs to one of ``modules_to_save``."""
        parts = name.split(".")
        modules = [".".join(parts[:end]) for end in range(1, len(parts))]
        return any(module.endswith(entry) for module in modules for entry in self.modules_to_save)
