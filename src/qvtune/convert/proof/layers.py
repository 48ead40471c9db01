"""Running transformers models of one architecture with one layer of one of them in memory at a time.

The model's own forward does everything but the layers: in their places stand stations that note how they are called.
The calls are then repeated layer by layer, all texts through one before the next is loaded. Forward is run once more
with the last stub giving what the last layer gave. Nothing here knows what a layer looks like inside.

Shape suffixes: T positions of a text, D hidden size, V vocabulary (or classes).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import nn

from qvtune.convert.merge.changes import LowRank
from qvtune.convert.proof.views import ModelView, unmerged
from qvtune.errors import UserError

_HEAD_WEIGHTS = 2**24  # of the output head, in memory at a time: 64 MiB in fp32
_SHOWN = 10

Weights = Mapping[str, torch.Tensor]
Texts = Sequence[Sequence[int]]


@dataclass
class _Pass:
    """One text on its way through one model: the hidden states, and what each layer is given beside them."""

    embeddings_1TD: torch.Tensor
    hidden_1TD: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    finished: bool = False


class _LayerStub(nn.Module):
    """Stands in for a layer; what forward wants to know of the layer, it gets from the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: no submodule
        self.text: _Pass | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)

    def forward(self, hidden_1TD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Note the call, or give the result of all calls."""
        assert self.text is not None
        if self.text.finished:
            return self.text.hidden_1TD
        if self.text.arguments and hidden_1TD is not self.text.hidden_1TD:
            raise UserError(_not_streamable(self._layer[0], "is not all that happens between hidden states"))
        self.text.hidden_1TD = hidden_1TD
        self.text.arguments.append((args, kwargs))
        return hidden_1TD


class LayeredModel:
    """An architecture without weights; each ``ModelView`` lends it its own.

    ``skeleton``: a transformers model with its parameters on the meta device and real buffers. Raises UserError where
    it has no list of layers.
    """

    def __init__(self, skeleton: Any) -> None:
        self._model = skeleton.eval()
        names = {id(parameter): name for name, parameter in skeleton.named_parameters()}  # tied ones: the first
        path, modules = _find_layers(skeleton)
        self._layers = {f"{path}.{index}": layer for index, layer in enumerate(modules)}
        self._stubs = [_LayerStub(layer) for layer in modules]
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

    def require_names(self, stored: Collection[str], what: str) -> None:
        """Raises UserError where a weight of the architecture is not among the tensors ``stored`` of ``what``."""
        if missing := [name for name in self._names if self._find(name, stored) is None]:
            problems = [f"{what}: tensor {name!r} of the architecture is missing" for name in missing[:_SHOWN]]
            raise UserError([*problems, f"{len(missing)} of {len(self._names)} are missing: no proof can be computed"])

    def _find(self, name: str, stored: Collection[str]) -> str | None:
        """How a weight is called in a checkpoint: bare models are stored without the prefix, a tied head not at all."""
        names = [name, self._embedding_name] if name in self._head_names.values() else [name]
        spelled = [form for one in names for form in (one, one.removeprefix(self._prefix), f"{self._prefix}{one}")]
        return next((form for form in spelled if form in stored), None)

    def _stored(self, name: str, view: ModelView) -> str:
        found = self._find(name, view.names)
        assert found is not None, f"{name}: require_names was not asked"
        return found

    @torch.no_grad()
    def logits(self, views: Sequence[ModelView], texts: Texts) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """Index of a text, first of some vocabulary entries, and from each view their fp32 logits [T, V].

        Of neighbouring views with the same ``read`` a layer is read once.
        """
        outside = [{name: view.rows(self._stored(name, view)) for name in self._outside} for view in views]
        passes = [self._enter(view, weights, texts) for view, weights in zip(views, outside, strict=True)]
        for number, (path, layer) in enumerate(self._layers.items()):
            for _, group in groupby(zip(views, passes, strict=True), key=lambda pair: pair[0].read):
                read: dict[str, torch.Tensor] = {}
                for view, of_view in group:
                    self._run_layer(layer, path, number, view, of_view, read)
        for first, heads in self._read_heads(views):
            for index in range(len(texts)):
                text = [of_view[index] for of_view in passes]
                yield index, first, [self._leave(*given) for given in zip(outside, heads, text, strict=True)]

    def _enter(self, view: ModelView, weights: Weights, texts: Texts) -> list[_Pass]:
        """All that forward does before the layers."""
        self._set_weight(
            weights, self._rows_of_head(view, 0, 1)
        )  # as little as possible of the head: nobody looks at logits
        passes = [_Pass(embeddings, embeddings) for embeddings in self._embed(view, texts)]
        for text in passes:
            self._forward(text)
            text.finished = True
            if len(text.arguments) != len(self._stubs):
                raise UserError(_not_streamable(self._model, "calls its layers otherwise than once each"))
        return passes

    def _embed(self, view: ModelView, texts: Texts) -> list[torch.Tensor]:
        """[1, T, D] of each text from the model's own embedding, of which only the rows in use are read."""
        ids = torch.tensor(sorted({token for text in texts for token in text}))
        stored = self._stored(self._embedding_name, view)
        rows = [view.rows(stored, token, token + 1) for token in ids.tolist()]
        _set_weight(self._embedding, "weight", torch.cat(rows))
        return [self._embedding(torch.searchsorted(ids, torch.tensor([text]))) for text in texts]

    def _run_layer(
        self, layer: nn.Module, path: str, number: int, view: ModelView, passes: Sequence[_Pass], read: dict[str, Any]
    ) -> None:
        """Take all texts of a view through one layer; ``read`` keeps what the base has there for the next view."""
        empty, hooks = dict(layer.named_parameters()), []
        for name in empty:
            owner, kind = _owner(layer, name)
            stored = self._stored(f"{path}.{name}", view)
            if stored not in read:
                read[stored] = view.read(stored, 0, None).float()
            change, weight = view.changes.get(stored), read[stored]
            if isinstance(change, LowRank):
                hooks.append(owner.register_forward_hook(unmerged(change)))
            elif change is not None:
                weight = change.apply(weight)
            _set_weight(owner, kind, weight)
        for text in passes:
            args, kwargs = text.arguments[number]
            text.hidden_1TD = layer(text.hidden_1TD, *args, **kwargs)
            if not isinstance(text.hidden_1TD, torch.Tensor):
                raise UserError(_not_streamable(layer, "gives more than hidden states"))
        for hook in hooks:
            hook.remove()
        for name, parameter in empty.items():
            owner, kind = _owner(layer, name)
            _set_weight(owner, kind, parameter)

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

    def _leave(self, outside: Weights, head: Weights, text: _Pass) -> torch.Tensor:
        """All that forward does behind the layers."""
        self._set_weight(outside, head)
        logits: torch.Tensor = self._forward(text).logits[0]
        return logits.reshape(-1, logits.shape[-1])

    def _forward(self, text: _Pass) -> Any:
        for stub in self._stubs:
            stub.text = text
        return self._model(inputs_embeds=text.embeddings_1TD, use_cache=False)

    def _set_weight(self, outside: Weights, head: Weights) -> None:
        for name, weight in outside.items():
            _set_weight(*_owner(self._model, name), weight)
        for kind, weight in head.items():
            _set_weight(self._head, kind, weight)


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
