"""Runs transformers models of one architecture with one layer of one of them in memory at a time.

Each layer is replaced by a stub that records its calls while the model's own forward does everything else. The recorded
calls are then made layer by layer, with all texts, before the next layer is read. At last forward is run again, with
the stubs returning the output of the last layer. Nothing here depends on what a layer computes.

Shape suffixes: N texts of a batch, T positions, D hidden size, V vocabulary entries (or classes).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvtune.convert.merge.changes import LowRank
from qvtune.convert.proof.stub import Batch, LayerStub, OtherHiddenStatesError
from qvtune.convert.proof.views import ModelView, ReadRows, unmerged
from qvtune.errors import UserError
from qvtune.model.skeleton import without_weights

_HEAD_WEIGHTS = 2**24  # weights of the output head in memory at a time: 64 MiB in fp32
_BATCH_POSITIONS = 1024  # bounds activations; matrix products with fewer rows are slower for each of them
_LEAST_FILLED = 0.75  # of a batch: shorter texts go into another one, since padding costs as much as text
_GPT_NEOX_HEAD = "embed_out.weight"  # what transformers calls lm_head.weight once it is loaded
_SHOWN = 10

Weights = Mapping[str, torch.Tensor]
Texts = Sequence[Sequence[int]]


class LayeredModel:
    """An architecture without weights, which runs with those of each ``ModelView``.

    ``skeleton``: a transformers model with its parameters on the meta device and real buffers. Raises UserError where
    it has not one list of layers.
    """

    def __init__(self, skeleton: Any) -> None:
        self._model = skeleton.eval()
        names = {id(parameter): name for name, parameter in skeleton.named_parameters()}  # tied ones: the first
        path, modules = _find_layers(skeleton)
        self._layers = {f"{path}.{index}": layer for index, layer in enumerate(modules)}
        self._stubs = [LayerStub(layer) for layer in modules]
        for index, stub in enumerate(self._stubs):
            modules[index] = stub
        self._embedding: nn.Embedding = skeleton.get_input_embeddings()
        self._embedding_name = names[id(self._embedding.weight)]
        self._head: nn.Module = skeleton.get_output_embeddings() or nn.Module()  # a classifier has none
        self._head_names = {kind: names[id(parameter)] for kind, parameter in self._head.named_parameters()}
        self._outside = [
            name
            for name in names.values()
            if not name.startswith(f"{path}.") and name not in (self._embedding_name, *self._head_names.values())
        ]
        self._names, self._prefix = list(names.values()), f"{skeleton.base_model_prefix}."
        self._head_shape = tuple(getattr(self._head, "weight", torch.empty(0)).shape)
        # Positions that see earlier ones only are not changed by padding behind them.
        causal = {
            module.is_causal
            for layer in self._layers.values()
            for module in layer.modules()
            if hasattr(module, "is_causal")
        }
        self._can_pad = bool(self._head_names) and causal == {True}

    def require_names(self, stored: Collection[str], what: str) -> None:
        """Raises UserError where a weight of the architecture is not among the tensors ``stored`` of ``what``."""
        if missing := [name for name in self._names if self._find(name, stored) is None]:
            problems = [f"{what}: tensor {name!r} of the architecture is missing" for name in missing[:_SHOWN]]
            raise UserError([*problems, f"{len(missing)} of {len(self._names)} are missing: no proof can be computed"])

    def _find(self, name: str, stored: Collection[str]) -> str | None:
        """Name of a weight in a checkpoint, which may have or lack the base model's prefix."""
        names = [name, _GPT_NEOX_HEAD] if name in self._head_names.values() else [name]
        spelled = [form for one in names for form in (one, one.removeprefix(self._prefix), f"{self._prefix}{one}")]
        return next((form for form in spelled if form in stored), None)

    def _stored(self, name: str, view: ModelView) -> str:
        found = self._find(name, view.names)
        assert found is not None, f"{name}: require_names was not called"
        return found

    @torch.no_grad()
    def logits(
        self, views: Sequence[ModelView], texts: Texts, subsets: Mapping[int, Collection[int]] | None = None
    ) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """Index of a text, first of some vocabulary entries, and from each view its fp32 logits [T, V] for them.

        ``subsets``: index of a view -> indices of the only texts that it runs on. A layer is read once for all views
        with the same ``read``.
        """
        outside = [{name: view.rows(self._stored(name, view)) for name in self._outside} for view in views]
        plan = self._plan(len(views), texts, subsets or {})
        batches: list[list[Batch | None]] = []  # of each view, as planned
        for index, (view, weights) in enumerate(zip(views, outside, strict=True)):
            self._set_weights(weights, self._rows_of_head(view, 0, 1))  # these logits are not used: as few as possible
            batches.append([self._enter(view, texts, batch) if index in on else None for on, batch in plan])
        for number in range(len(self._stubs)):
            self._run_layer(number, views, batches)
        for first, heads in self._read_heads(views):
            for at, (on, batch) in enumerate(plan):
                logits = [self._leave(outside[index], heads[index], batches[index][at]) for index in on]
                for row, text in enumerate(batch):
                    yield text, first, [_of_text(one[row], len(texts[text])) for one in logits]

    def _plan(
        self, num_views: int, texts: Texts, subsets: Mapping[int, Collection[int]]
    ) -> list[tuple[list[int], list[int]]]:
        """Indices of views and of the texts that they run on together: one, or several of nearly the same length."""
        plan: list[tuple[list[int], list[int]]] = []
        views_of = [
            [view for view in range(num_views) if text in subsets.get(view, [text])] for text in range(len(texts))
        ]
        for text in sorted(range(len(texts)), key=lambda text: (views_of[text], -len(texts[text]))):
            on, batch = plan[-1] if plan else ([], [])
            longest = len(texts[batch[0]]) if batch else 0
            fits = longest * (len(batch) + 1) <= _BATCH_POSITIONS and len(texts[text]) >= _LEAST_FILLED * longest
            if self._can_pad and on == views_of[text] and fits:
                batch.append(text)
            else:
                plan.append((views_of[text], [text]))
        return plan

    def _enter(self, view: ModelView, texts: Texts, indices: Sequence[int]) -> Batch:
        """Everything that forward does before the layers."""
        embeddings = self._embed(view, [texts[index] for index in indices])
        for returns_tuple in (False, True):
            batch = Batch(embeddings, embeddings)
            for stub in self._stubs:
                stub.returns_tuple |= returns_tuple
            try:
                self._forward(batch)
            except OtherHiddenStatesError:
                continue
            batch.finished = True
            if len(batch.arguments) != len(self._stubs):
                raise UserError(_not_streamable(self._model, "calls its layers otherwise than once each"))
            return batch
        layer = next(iter(self._layers.values()))
        raise UserError(_not_streamable(layer, "is not all that happens between hidden states"))

    def _embed(self, view: ModelView, texts: Texts) -> torch.Tensor:
        """[N, T, D] from the model's own embedding, of which only the rows in use are read; padded at the end."""
        ids = torch.tensor(sorted({token for text in texts for token in text}))
        stored = self._stored(self._embedding_name, view)
        rows = [view.rows(stored, token, token + 1) for token in ids.tolist()]
        _set_weight(self._embedding, "weight", torch.cat(rows))
        longest = max(map(len, texts))
        padded = torch.tensor([[*text, *[text[-1]] * (longest - len(text))] for text in texts])
        embeddings: torch.Tensor = self._embedding(torch.searchsorted(ids, padded))
        return embeddings

    def _run_layer(self, number: int, views: Sequence[ModelView], batches: Sequence[Sequence[Batch | None]]) -> None:
        """Take all batches of all views through one layer; of views with the same ``read``, one after the other."""
        by_read: dict[ReadRows, list[int]] = {}
        for index, view in enumerate(views):
            by_read.setdefault(view.read, []).append(index)
        path, layer = list(self._layers.items())[number]
        for indices in by_read.values():
            read: dict[str, torch.Tensor] = {}
            for index in indices:
                with self._weights_of(views[index], path, layer, read):
                    for batch in filter(None, batches[index]):
                        self._step(layer, number, batch)

    def _step(self, layer: nn.Module, number: int, batch: Batch) -> None:
        args, kwargs = batch.arguments[number]
        batch.arguments[number] = ((), {})  # not needed any more
        output = layer(batch.hidden_NTD, *args, **kwargs)
        self._stubs[number].returns_tuple = isinstance(output, tuple | list)
        batch.hidden_NTD = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(batch.hidden_NTD, torch.Tensor):
            raise UserError(_not_streamable(layer, "gives something else than hidden states"))

    @contextmanager
    def _weights_of(
        self, view: ModelView, path: str, layer: nn.Module, read: dict[str, torch.Tensor]
    ) -> Iterator[None]:
        """The layer with the view's weights; ``read`` keeps the stored values for the next view."""
        empty, hooks = dict(layer.named_parameters()), []
        for name in empty:
            owner, kind = _owner(layer, name)
            stored = self._stored(f"{path}.{name}", view)
            if stored not in read:
                read[stored] = view.read(stored, 0, None)
            change = view.changes.get(stored)
            if isinstance(change, LowRank) and view.merger is None:
                hooks.append(owner.register_forward_hook(unmerged(change)))
                change = None
            _set_weight(owner, kind, view.weight(stored, read[stored], change))
        yield
        for hook in hooks:
            hook.remove()
        for name, parameter in empty.items():
            owner, kind = _owner(layer, name)
            owner._parameters[kind] = parameter

    def _read_heads(self, views: Sequence[ModelView]) -> Iterator[tuple[int, list[Weights]]]:
        """First entry of a part of the vocabulary, and each view's head for it."""
        if not self._head_names:
            yield 0, [{} for _ in views]
            return
        num_entries, width = self._head_shape
        step = max(1, _HEAD_WEIGHTS // width)
        for first in range(0, num_entries, step):
            last = min(first + step, num_entries)
            yield first, [self._rows_of_head(view, first, last) for view in views]

    def _rows_of_head(self, view: ModelView, first: int, last: int) -> Weights:
        return {kind: view.rows(self._stored(name, view), first, last) for kind, name in self._head_names.items()}

    def _leave(self, outside: Weights, head: Weights, batch: Batch | None) -> torch.Tensor:
        """Everything that forward does after the layers: logits [N, ...]."""
        assert batch is not None, "planned"
        self._set_weights(outside, head)
        logits: torch.Tensor = self._forward(batch).logits
        return logits

    def _forward(self, batch: Batch) -> Any:
        for stub in self._stubs:
            stub.batch = batch
        return self._model(inputs_embeds=batch.embeddings_NTD, use_cache=False)

    def _set_weights(self, outside: Weights, head: Weights) -> None:
        for name, weight in outside.items():
            _set_weight(*_owner(self._model, name), weight)
        for kind, weight in head.items():
            _set_weight(self._head, kind, weight)


def _of_text(logits: torch.Tensor, length: int) -> torch.Tensor:
    """[T, V] without padding; of a classifier [1, V]."""
    return logits.reshape(-1, logits.shape[-1])[:length]


def _find_layers(skeleton: Any) -> tuple[str, nn.ModuleList]:
    """Path and list of the modules that the hidden states go through one after another."""
    expected = skeleton.config.get_text_config().num_hidden_layers
    lists = [
        (path, module)
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == expected
    ]
    if len(lists) != 1:
        raise UserError(_not_streamable(skeleton, f"has {len(lists)} lists of {expected} layers instead of one"))
    return lists[0]


def _not_streamable(module: nn.Module, reason: str) -> str:
    return f"{type(module).__name__} {reason}: a proof cannot go through models of this architecture layer by layer"


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that has a parameter, and the parameter's name there."""
    path, _, kind = name.rpartition(".")
    return module.get_submodule(path), kind


def _set_weight(module: nn.Module, kind: str, weight: torch.Tensor) -> None:
    module._parameters[kind] = nn.Parameter(weight, requires_grad=False)


def empty_model(folder: Path, changes: Mapping[str, Any], trust_remote_code: bool) -> LayeredModel:
    """The architecture of a folder's config.json with ``changes``, without weights.

    Raises UserError where a proof cannot be computed for it.
    """
    return LayeredModel(skeleton(folder, changes, trust_remote_code))


def skeleton(folder: Path, changes: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """The transformers model of a folder's config.json with ``changes``, its parameters on the meta device.

    Raises UserError for a config.json that transformers does not know.
    """
    import transformers

    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    config.update(changes)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    name = (config.architectures or ["ForCausalLM"])[0]
    kinds = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")
    kind = next((kind for kind in kinds if name.endswith(kind)), "ForCausalLM")
    auto_class = getattr(transformers, f"AutoModel{kind}")
    return without_weights(auto_class, config, torch.float32, trust_remote_code=trust_remote_code)
