"""Answers while training: each rank generates for its share of the prompts, without any collective in between."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from qvtune.config.generate import GenerateSection
from qvtune.distributed import process_group
from qvtune.distributed.stop import StopRequest
from qvtune.model.whole import WholeModel
from qvtune.tasks.final_answer import exact_match
from qvtune.train.prompts import Prompt

Poll = Callable[[], None]


@dataclass(frozen=True)
class Answer:
    """What the model has generated for a prompt, without special tokens; ``tokens`` counts these, too."""

    prompt: str
    answer: str
    expected: str | None
    tokens: int


@dataclass(frozen=True)
class Generation:
    """Answers in the order of the prompts; ``exact_match`` is None where no answers are expected."""

    answers: list[Answer]
    exact_match: float | None
    seconds: float

    def fields(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        found = {} if self.exact_match is None else {"exact_match": self.exact_match}
        answers = [asdict(one) for one in self.answers]
        return {**found, "tokens": sum(one.tokens for one in self.answers), "seconds": self.seconds, "answers": answers}


def generate(
    whole: WholeModel,
    engine: Any,
    prompts: Sequence[Prompt],
    settings: GenerateSection,
    tokenizer: Any,
    stop: StopRequest,
) -> Generation:
    """The most likely answers of the model as it is now; collective, with the same result on all ranks.

    A request to stop is noticed between two modules that are gathered, and between two tokens.
    """
    started = time.monotonic()
    rank, world_size = process_group.rank(), process_group.world_size()
    own = prompts[rank::world_size]
    with whole.filled(engine, stop.poll) as model, process_group.raise_on_all_ranks(however_long=True):
        continuations = _continuations(model, own, settings, stop.poll_alone)
    own_answers = [
        Answer(prompt.text, tokenizer.decode(ids, skip_special_tokens=True).strip(), prompt.expected, len(ids))
        for prompt, ids in zip(own, continuations, strict=True)
    ]
    of_ranks = process_group.all_gather_object(own_answers)
    answers = [of_ranks[number % world_size][number // world_size] for number in range(len(prompts))]
    pairs = [(one.answer, one.expected) for one in answers if one.expected is not None]
    share = exact_match(pairs, settings.final_answer) if pairs else None
    return Generation(answers, share, time.monotonic() - started)


def _continuations(model: Any, prompts: Sequence[Prompt], settings: GenerateSection, poll: Poll) -> list[list[int]]:
    """New tokens of each prompt, with the token that ends them. Prompts of similar lengths go together."""
    found: dict[int, list[int]] = {}
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number].ids))
    for start in range(0, len(prompts), settings.batch_size):
        batch = by_length[start : start + settings.batch_size]
        new = generate_batch(model, [prompts[number].ids for number in batch], settings.max_new_tokens, poll)
        found |= dict(zip(batch, new, strict=True))
    return [found[number] for number in range(len(prompts))]


def generate_batch(model: Any, prompts: Sequence[list[int]], max_new_tokens: int, poll: Poll) -> list[list[int]]:
    """The most likely tokens after each of ``prompts``, by transformers' own generation with a cache."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    width = max(map(len, prompts))
    padded_BT = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    output_BT = model.generate(
        input_ids=padded_BT,
        attention_mask=mask_BT,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=0,  # behind an answer that has ended; cut off below
        synced_gpus=False,
        stopping_criteria=StoppingCriteriaList([_Poll(poll)]),
    )
    return [_up_to_end(ids, ends) for ids in output_BT[:, width:].tolist()]


def _up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    length = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:length]


class _Poll(StoppingCriteria):
    """Calls a function after every token. It ends nothing, but the function may raise an exception."""

    def __init__(self, poll: Poll) -> None:
        self._poll = poll

    def __call__(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
        self._poll()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
