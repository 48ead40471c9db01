"""Reading what PEFT has saved: adapter_config.json and its tensors, checked against the base."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qvtune.convert.merge.changes import Adapter, Change, Composed, LowRank, Replaced, RowsReplaced, Scaled
from qvtune.convert.sources.heads import OUTPUT, head_settings, input_of, is_other_head, untie
from qvtune.convert.sources.names import model_names, plain_keys
from qvtune.convert.sources.peft_config import HEAD_TASKS, PeftConfig
from qvtune.errors import UserError
from qvtune.model.head import is_head_tensor
from qvtune.storage.safetensors import StoredTensor

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)")
_VECTOR = re.compile(r"(?P<module>.+)\.ia3_l")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_IN_A_LAYER = re.compile(r"(^|\.)\d+\.")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out)\.weight")
_LINEAR, _EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"


def peft_adapter(
    where: str, config: PeftConfig, stored: Mapping[str, Tensor], base: Mapping[str, StoredTensor]
) -> Adapter:
    """The adapter of PEFT's ``config`` and ``stored`` tensors, which fits ``base`` in every name and shape.

    ``where`` the tensors come from is for messages. Raises UserError with all that is wrong: what cannot be merged, and
    tensors that are missing, unknown, mis-shaped, empty or not finite.
    """
    plain = plain_keys(stored)
    problems = list(config.problems()) or list(_value_problems(where, plain))
    if problems:
        raise UserError(problems)
    reader = _Reader(config, plain, base)
    changes = reader.changes()
    if reader.problems:
        advice = f"the adapter and the base ({_folder(base)}) must belong together; another base is chosen by --base"
        raise UserError([*(f"{where}: {problem}" for problem in reader.problems), advice])
    return _placed(config, changes, reader.names, base, plain)


def _value_problems(where: str, plain: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with the tensors whatever the base is, but for shapes."""
    factors = [tensor.dtype for key, tensor in plain.items() if _PART.fullmatch(key) and tensor.numel()]
    if len(dtypes := Counter(factors)) > 1:
        found = ", ".join(f"{count} x {dtype}" for dtype, count in dtypes.items())
        yield f"{where}: holds factors of several dtypes ({found}), expected one"
    if not plain:
        yield f"{where}: holds no tensors"


@dataclass
class _Reader:
    """Turns tensors into changes, by name in the trained model; collects every ``problem`` on the way."""

    config: PeftConfig
    plain: Mapping[str, Tensor]
    base: Mapping[str, StoredTensor]
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.saved: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}
        self.vectors: dict[str, Tensor] = {}
        for key, tensor in self.plain.items():
            if match := _PART.fullmatch(key):
                self.parts[match["module"]][match["part"]] = tensor
            elif match := _TOKENS.fullmatch(key):
                self.tokens[match["module"]] = tensor
            elif match := _VECTOR.fullmatch(key):
                self.vectors[match["module"]] = tensor
            else:
                self.saved[key] = tensor
        wanted = [f"{module}.weight" for module in (*self.parts, *self.tokens, *self.vectors)]
        task_type = self.config.get("task_type")
        names = model_names([*wanted, *self.saved], self.base)
        self.names = {
            name: found
            for name, found in names.items()
            if not (is_other_head(name, task_type) or self._is_replaced_head(name, self.base[found]))
        }

    def _is_replaced_head(self, name: str, stored: StoredTensor) -> bool:
        """Whether the base's head, which is for other classes, gives way to the one that was saved."""
        saved = self.saved.get(name)
        return saved is not None and is_head_tensor(name) and saved.numel() > 0 and tuple(saved.shape) != stored.shape

    def changes(self) -> dict[str, Change]:
        """Every change; what has no place in the base is either new (``modules_to_save``) or a problem."""
        for key, tensor in sorted(self.plain.items()):
            if tensor.numel() == 0:
                shape = list(tensor.shape)
                self.problems.append(f"{_key(key)} is empty, {shape}: ZeRO-3 saved it without gathering its parts")
            elif not tensor.isfinite().all():
                self.problems.append(f"{_key(key)} holds values that are not finite")
        changes: dict[str, Change] = {name: self._replaced(name, tensor) for name, tensor in self.saved.items()}
        for module, rows in self.tokens.items():
            changes[f"{module}.weight"] = self._rows(module, rows)
        for module, parts in self.parts.items():
            name = f"{module}.weight"
            if change := self._low_rank(module, parts):
                changes[name] = Composed(changes[name], change) if name in changes else change
        for module, vector in self.vectors.items():
            changes |= self._scaled(module, vector)
        self.problems += self._missing()
        return changes

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor in the base; that of the input embeddings for an output matrix that is tied to them."""
        if name not in self.names and name == OUTPUT:
            name = input_of(self.names) or name
        return self.base[self.names[name]].shape if name in self.names else None

    def _low_rank(self, module: str, parts: dict[str, Tensor]) -> LowRank | None:
        shape = self._shape(f"{module}.weight")
        if shape is None or len(shape) != 2 or self.config.targets(module) is False:
            what = "matches no target module of the base" if shape is None else "is not among target_modules"
            self.problems += [f"{_key(f'{module}.{part}')} {list(one.shape)} {what}" for part, one in parts.items()]
            return None
        a, b = _EMBEDDING if _EMBEDDING[0] in parts else _LINEAR
        is_conv1d = bool(self.config.get("fan_in_fan_out")) and shape == self._conv1d_shape(parts, shape)
        transposed = a == _EMBEDDING[0] or is_conv1d
        num_in, num_out = shape if transposed else reversed(shape)
        rank = self.config.rank(module)
        expected: dict[str, tuple[int, ...]] = {a: (rank, num_in), b: (num_out, rank)}
        if self.config.get("use_dora"):
            expected[_MAGNITUDE] = (num_out,)
        if not self._complete(module, parts, expected):
            return None
        return LowRank(parts[a], parts[b], self.config.scaling(module), transposed, parts.get(_MAGNITUDE))

    def _scaled(self, module: str, vector: Tensor) -> dict[str, Change]:
        """Of the weight, and of the bias where outputs are scaled."""
        shape, key = self._shape(f"{module}.weight"), _key(f"{module}.ia3_l")
        if shape is None or len(shape) != 2 or self.config.targets(module) is False or not self.config.is_ia3:
            self.problems.append(f"{key} {list(vector.shape)} matches no target module of the base")
            return {}
        if vector.numel() and tuple(vector.shape) not in ((shape[0], 1), (1, shape[1])):
            expected = f"[{shape[0]}, 1] or [1, {shape[1]}]"
            self.problems.append(f"{key} has shape {list(vector.shape)}, the base needs {expected}")
        changes: dict[str, Change] = {f"{module}.weight": Scaled(vector)}
        if vector.shape[-1] == 1 and f"{module}.bias" in self.names:
            changes[f"{module}.bias"] = Scaled(vector.flatten())
        return changes

    @staticmethod
    def _conv1d_shape(parts: dict[str, Tensor], shape: tuple[int, ...]) -> tuple[int, ...]:
        """[in, out] by the factors; ``shape`` where they cannot tell."""
        found = [parts.get(part) for part in _LINEAR]
        if any(factor is None or factor.dim() != 2 for factor in found):
            return shape
        factor_a, factor_b = (factor for factor in found if factor is not None)
        return factor_a.shape[1], factor_b.shape[0]

    def _complete(self, module: str, parts: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> bool:
        problems = []
        for part, shape in expected.items():
            key = _key(f"{module}.{part}")
            if part not in parts:
                problems.append(f"{key} {list(shape)} is missing")
            elif parts[part].numel() and tuple(parts[part].shape) != shape:
                problems.append(f"{key} has shape {list(parts[part].shape)}, the base needs {list(shape)}")
        for part in parts.keys() - expected.keys():
            problems.append(f"{_key(f'{module}.{part}')} {list(parts[part].shape)} is not used by this kind of adapter")
        self.problems += problems
        return not problems

    def _replaced(self, name: str, tensor: Tensor) -> Replaced:
        shape, saves = self._shape(name), self.config.saves(name)
        trained_bias = name.endswith(".bias") and self.config.bias != "none"
        if not (saves or (shape and (trained_bias or _EMBEDDINGS.search(name)))):
            what = "is not a LoRA factor, nor of a module in modules_to_save"
            self.problems.append(f"{_key(name)} {list(tensor.shape)} {what}")
        elif shape and tensor.numel() and tuple(tensor.shape) != shape:
            hint = "; was the vocabulary resized? Resize the base's" if _EMBEDDINGS.search(name) else ""
            problem = f"has shape {list(tensor.shape)}, the base needs {list(shape)}{hint}"
            self.problems.append(f"{_key(name)} {problem}")
        return Replaced(tensor)

    def _rows(self, module: str, rows: Tensor) -> RowsReplaced:
        chosen = self.config.get("trainable_token_indices") or ()
        if isinstance(chosen, dict):
            chosen = next((indices for end, indices in chosen.items() if module.endswith(end)), ())
        shape = self._shape(f"{module}.weight")
        fits = shape is not None and tuple(rows.shape) == (len(chosen), shape[1])
        if not (fits and shape and all(0 <= index < shape[0] for index in chosen)):
            found = f"{len(chosen)} token(s) in trainable_token_indices and {shape and list(shape)} in the base"
            self.problems.append(
                f"{_key(module)}.token_adapter has shape {list(rows.shape)}, which does not fit {found}"
            )
        return RowsReplaced(tuple(chosen), rows)

    def _missing(self) -> Iterator[str]:
        """What the configuration promises for this base and nobody has saved."""
        adapted = {*self.parts, *self.vectors}
        adapted_ends = {module.rpartition(".")[2] for module in adapted}
        for name, found in self.names.items():
            module, _, kind = name.rpartition(".")
            targeted = self.config.targets(module)
            if targeted is None:  # the other layers tell which modules were meant
                targeted = module.rpartition(".")[2] in adapted_ends and not self.config.saves(name)
            inside = not self._has_own_head or bool(_IN_A_LAYER.search(module))  # else the base's file may have more
            shape = self.base[found].shape
            if kind == "weight" and len(shape) == 2 and targeted and inside and module not in adapted:
                part = "ia3_l" if self.config.is_ia3 else f"lora_A.weight {[self.config.rank(module), shape[1]]}"
                yield f"{_key(module)}.{part} is missing"
            of_bias = {"none": False, "all": inside, "lora_only": targeted}
            if kind == "bias" and of_bias[self.config.bias] and name not in self.saved:
                yield f"{_key(name)} is missing (bias: {self.config.bias})"
        yield from self._missing_saved()

    def _missing_saved(self) -> Iterator[str]:
        wanted = {name for name in self.names if self.config.saves(name)}
        tied_in_training = bool(self.config.get("ensure_weight_tying"))
        if self.config.saves(OUTPUT) and not (tied_in_training or self._has_own_head):
            wanted.add(OUTPUT)  # the base's file has none where it is tied to the input
        for name in sorted(wanted - self.saved.keys()):
            yield f"{_key(name)} is missing (modules_to_save)"

    @property
    def _has_own_head(self) -> bool:
        return self.config.get("task_type") in HEAD_TASKS


def _placed(
    config: PeftConfig,
    changes: dict[str, Change],
    names: dict[str, str],
    base: Mapping[str, StoredTensor],
    plain: Mapping[str, Tensor],
) -> Adapter:
    """Names of the trained model become names of the base; what it does not have is added."""
    task_type = config.get("task_type")
    settings = head_settings(task_type, changes, _folder(base))
    trained_tied = bool(config.get("ensure_weight_tying"))
    untied, more_settings = ({}, {}) if task_type in HEAD_TASKS else untie(trained_tied, changes, names, base)
    added = {name: one.tensor for name, one in changes.items() if name not in names and isinstance(one, Replaced)}
    factors = [tensor.dtype for key, tensor in plain.items() if _PART.fullmatch(key)]
    return Adapter(
        changes={names[name]: change for name, change in changes.items() if name in names},
        dtype=(factors or [tensor.dtype for tensor in plain.values()])[0],
        added=added | untied,
        dropped=frozenset(base.keys() - names.values()) if settings else frozenset(),
        config=settings | more_settings,
        peft_config=config.values,
    )


def _folder(base: Mapping[str, StoredTensor]) -> Any:
    return next(iter(base.values())).file.parent


def _key(name: str) -> str:
    return f"base_model.model.{name}"
