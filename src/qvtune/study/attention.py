"""How training has changed a model's attention: entropy, and divergence from the base's, by layer and head.

Shape suffixes: L layers, H heads, T positions of the queries, S positions of the keys.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qvtune.console import console
from qvtune.convert.conversion import Conversion, open_conversion
from qvtune.convert.proof.layers import skeleton
from qvtune.convert.proof.texts import Text, evaluation_rows, fixed_prompts
from qvtune.convert.proof.views import ModelView, adapted_base
from qvtune.convert.sources.names import model_names
from qvtune.convert.sources.source import open_source
from qvtune.errors import Problems
from qvtune.storage.atomic import atomic_file
from qvtune.study.attention_report import ATTENTION_FILE

_LEAST = 1e-30  # a probability of 0 counts as this much, so that its logarithm is finite

Tensors = Mapping[str, torch.Tensor]


def measure_runs(runs: Sequence[Path], num_rows: int, max_tokens: int) -> None:
    """Write ``attention.csv`` into each run folder: layer, head, and what ``compare_attention`` gives, in nats.

    The newest checkpoint of a run is compared with its base on ``num_rows`` rows of its evaluation data, or on fixed
    prompts where it has none, of at most ``max_tokens`` tokens each. Both compute in float32 with the weights that
    training saw. Raises UserError for runs without a checkpoint, all of them together.
    """
    problems = Problems()
    conversions = [problems.attempt(partial(_open, run)) for run in runs]
    problems.raise_all()
    for run, conversion in zip(runs, conversions, strict=True):
        assert conversion is not None
        texts = [Text(text.ids[:max_tokens], text.targets) for text in _texts(conversion, num_rows)]
        found = measure(conversion, [text.ids for text in texts])
        with atomic_file(run / ATTENTION_FILE) as private:
            private.write_text(_csv(found), encoding="utf-8")
        line = f"{run / ATTENTION_FILE}: {len(texts)} rows, mean KL {found['kl'].mean():.3g} nats"
        console().print(line, markup=False, soft_wrap=True)


def _open(run: Path) -> Conversion:
    return open_conversion(open_source(run), None, "auto")


def measure(conversion: Conversion, texts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """What ``compare_attention`` gives, each [L, H]: means over all positions of all texts."""
    adapted = adapted_base(conversion.base, conversion.adapter)
    base = ModelView(adapted.names, adapted.read, {}, adapted.base_dtype)
    model = skeleton(conversion.base.folder, conversion.settings, conversion.model.trust_remote_code)
    model.set_attn_implementation("eager")  # the only one that gives its probabilities
    pairs = zip(_attentions(model, base, texts), _attentions(model, adapted, texts), strict=True)
    of_texts = [compare_attention(base_LHTS.double(), adapted_LHTS.double()) for base_LHTS, adapted_LHTS in pairs]
    return {name: torch.cat([one[name] for one in of_texts], dim=2).mean(dim=2) for name in of_texts[0]}


def compare_attention(base: torch.Tensor, adapted: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of probabilities [..., T, S], each [..., T] in nats: the base's entropy, its change, KL(adapted || base), and the
    Jensen-Shannon divergence, which is at most ln 2."""
    middle = (base + adapted) / 2
    return {
        "entropy_base": entropy(base),
        "entropy_change": entropy(adapted) - entropy(base),
        "kl": divergence(adapted, base),
        "js": (divergence(adapted, middle) + divergence(base, middle)) / 2,
    }


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """-sum p log p over the last dimension, with 0 log 0 = 0."""
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler: sum p log(p / q) over the last dimension."""
    return (torch.xlogy(p, p) - p * q.clamp_min(_LEAST).log()).sum(dim=-1)


@torch.no_grad()
def _attentions(model: Any, view: ModelView, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Of each text [L, H, T, S], by the weights of a view."""
    _fill(model, view)
    found = []
    for ids in texts:
        output = model(input_ids=torch.tensor([list(ids)]), output_attentions=True)
        found.append(torch.cat(output.attentions))
    return found


def _fill(model: Any, view: ModelView) -> None:
    """Put the weights of a view in place of the parameters."""
    names = model_names([name for name, _ in model.named_parameters()], list(view.names))
    for name, _ in list(model.named_parameters()):
        path, _, kind = name.rpartition(".")
        weight = view.rows(names[name])
        model.get_submodule(path)._parameters[kind] = torch.nn.Parameter(weight, requires_grad=False)
    model.tie_weights()
    model.eval()


def _texts(conversion: Conversion, num_rows: int) -> list[Text]:
    from transformers import AutoTokenizer

    folder, trusted = conversion.base.folder, conversion.model.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    run = conversion.source.path if conversion.source.state is not None else None
    rows = evaluation_rows(tokenizer, run, None)  # none where the data is gone
    if rows and num_rows > len(rows):
        rows = evaluation_rows(tokenizer, run, num_rows)
    return rows[:num_rows] or fixed_prompts(tokenizer)


def _csv(found: Tensors) -> str:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["layer", "head", *found])
    writer.writerows(_rows(found))
    return file.getvalue()


def _rows(found: Tensors) -> Iterator[list[object]]:
    num_layers, num_heads = next(iter(found.values())).shape
    for layer in range(num_layers):
        for head in range(num_heads):
            yield [layer, head, *(f"{values[layer, head].item():.9g}" for values in found.values())]
