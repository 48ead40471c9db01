"""``--check-with``: the greedy tokens of a reader, judged by what the proof computes from the same folder.

The reader continues the proof's prompts. The proof's own model, with the weights as written and in float32, then goes
over prompts and continuations: each token must be its first choice, or nearer to that than rounding explains. So a
near tie does not hide what comes after it, and no second library has to hold the whole model.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from qvtune.config.outputs import ReaderName
from qvtune.console import console
from qvtune.convert.conversion import Conversion
from qvtune.convert.proof.compare import LogitSums
from qvtune.convert.proof.layers import LayeredModel
from qvtune.convert.proof.texts import fixed_prompts
from qvtune.convert.proof.views import ModelView
from qvtune.convert.readers.process import Answer, Request
from qvtune.convert.serving import end_tokens
from qvtune.data import IGNORE_INDEX
from qvtune.errors import UserError
from qvtune.storage.partial import KeptError

MAX_NEW_TOKENS = 32
# float32: as the proof's. Else units in the last place of the position's largest logit. In bfloat16 SmolLM2-135M, with
# logits up to 47, chooses another token at 11 of 641 positions, at most 0.10 below the first choice (float16: 1,
# 0.002); a random model of two layers, with logits of 4.5, at most 0.09 below.
_LEAST, _UNITS = 1e-3, 4
_SHOWN_LINES = 25
_KEPT = "what is merged is kept: the same command resumes, without --check-with also to the end"


class ReaderError(KeptError):
    """A reader fails, or computes something else than what was written, which is kept."""

    exit_code = 1


@dataclass(frozen=True)
class Judged:
    """A prompt's continuation. ``difference``: what is wrong with it, None where nothing is; ``near_ties``: tokens
    that are not the first choice, but as good as that."""

    tokens: int
    near_ties: int
    difference: str | None


@dataclass(frozen=True)
class ReaderCheck:
    """What a reader was asked and how it answered."""

    reader: str
    version: str
    dtype: str
    prompts: list[Judged]

    @property
    def passed(self) -> bool:
        """Whether every token is one that the written weights give."""
        return all(one.difference is None for one in self.prompts)

    def summary(self) -> str:
        """One line, for the card."""
        tokens, ties = (sum(getattr(one, name) for one in self.prompts) for name in ("tokens", "near_ties"))
        return (
            f"{self.reader} {self.version} in {self.dtype}: {tokens} greedy tokens on {len(self.prompts)} prompts are "
            f"those of the written weights, {ties} of them by a near tie"
        )


def require_readable(reader: ReaderName, conversion: Conversion) -> None:
    """Raises UserError for a classifier that this reader, or this check, cannot compare."""
    if conversion.is_classifier and reader != "transformers":
        raise UserError(f"--check-with {reader}: compares tokens, which a classifier has not; use transformers")
    if conversion.settings.get("problem_type") == "regression":
        raise UserError("--check-with: compares choices, and a score is none; the proof compares the scores")


def check(
    reader: ReaderName, arguments: dict[str, Any], conversion: Conversion, layered: LayeredModel, written: ModelView
) -> ReaderCheck:
    """Ask the reader, judge and show the answer. ``arguments``: how it loads the folder of which ``written`` are the
    weights. Raises ReaderError where it fails or differs."""
    prompts = [text.ids for text in fixed_prompts(conversion.tokenizer)]
    answer = ask(Request(reader, arguments, prompts, 0 if conversion.is_classifier else MAX_NEW_TOKENS))
    judge = _judge_class if conversion.is_classifier else _judge_tokens
    found = ReaderCheck(reader, answer.version, answer.dtype, judge(conversion, layered, written, prompts, answer))
    _show(found)
    if not found.passed:
        raise ReaderError(
            f"--check-with: {reader} {answer.version} does not compute what was written, see the table; {_KEPT}"
        )
    return found


def ask(request: Request) -> Answer:
    """The answer of a fresh process. Raises ReaderError with the end of its output where there is none."""
    console().print(f"{request.reader} continues {len(request.prompts)} prompts, in a process of its own")
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, log = (Path(folder) / name for name in ("request.json", "answer.json", "log.txt"))
        asked.write_text(json.dumps(asdict(request)), encoding="utf-8")
        command = [sys.executable, "-m", "qvtune.convert.readers.process", str(asked), str(answered)]
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        if code == 0:
            return Answer(**json.loads(answered.read_text(encoding="utf-8")))
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
    console().print("\n".join(last), markup=False)
    raise ReaderError(f"--check-with: {request.reader} failed with exit code {code}, see its last lines above; {_KEPT}")


def _judge_tokens(
    conversion: Conversion, layered: LayeredModel, written: ModelView, prompts: Sequence[list[int]], answer: Answer
) -> list[Judged]:
    texts = [[*ids, *new] for ids, new in zip(prompts, answer.tokens, strict=True)]
    labels = [
        [IGNORE_INDEX] * (len(ids) - 1) + new + [IGNORE_INDEX] for ids, new in zip(prompts, answer.tokens, strict=True)
    ]
    ends, name = end_tokens(conversion), conversion.tokenizer.convert_ids_to_tokens
    found = []
    for ids, new, sums in zip(prompts, answer.tokens, _sums(layered, written, texts, labels), strict=True):
        choices, largest, behind = sums.choices()
        start = len(ids) - 1
        first = choices[0, start:].tolist()  # of each new token, and of the one that would follow
        allowed = _allowed(largest[0, start:], answer.dtype)
        gaps = behind[0, start : start + len(new)]
        differing = (~(gaps <= allowed[: len(new)])).nonzero().flatten().tolist()  # also where one is NaN
        difference = None
        if differing:
            at = differing[0]
            difference = (
                f"token {at + 1} is {name(new[at])!r} ({new[at]}) instead of {name(first[at])!r} ({first[at]}), whose "
                f"logit is {gaps[at]:.2g} higher; allowed {allowed[at]:.2g}"
            )
        else:
            difference = _wrong_end(new, first[len(new)], ends, name)
        ties = sum(one != other for one, other in zip(new, first, strict=False)) - len(differing)
        found.append(Judged(len(new), ties, difference))
    return found


def _wrong_end(new: Sequence[int], next_choice: int, ends: Sequence[int], name: Any) -> str | None:
    """What is wrong with where the reader has stopped; it may leave out the token at which it has."""
    if early := [at for at, token in enumerate(new[:-1]) if token in ends]:
        return f"does not stop at token {early[0] + 1}, {name(new[early[0]])!r}, which ends an answer"
    if len(new) < MAX_NEW_TOKENS and next_choice not in ends and not (new and new[-1] in ends):
        return f"stops after {len(new)} tokens, where no answer ends: {name(next_choice)!r} follows"
    return None


def _judge_class(
    conversion: Conversion, layered: LayeredModel, written: ModelView, prompts: Sequence[list[int]], answer: Answer
) -> list[Judged]:
    found = []
    for (given,), sums in zip(answer.tokens, _sums(layered, written, prompts, answer.tokens), strict=True):
        choices, largest, behind = (one[0, 0] for one in sums.choices())
        allowed = _allowed(largest, answer.dtype)
        difference = None
        if not behind <= allowed:
            difference = f"class {given}, but the logit of {choices} is {behind:.2g} higher; allowed {allowed:.2g}"
        found.append(Judged(1, int(difference is None and given != choices), difference))
    return found


def _sums(
    layered: LayeredModel, written: ModelView, texts: Sequence[list[int]], labels: Sequence[list[int]]
) -> list[LogitSums]:
    sums = [LogitSums(1, torch.tensor(one), pairs=[]) for one in labels]
    for index, first, logits in layered.logits([written], texts):
        sums[index].add(first, logits)
    return sums


def _allowed(largest: torch.Tensor, dtype: str) -> torch.Tensor:
    """How far below the largest logit another one counts as equal, for a reader that computes in ``dtype``."""
    return (_UNITS * torch.finfo(getattr(torch, dtype)).eps * largest.abs()).clamp(min=_LEAST)


def _show(found: ReaderCheck) -> None:
    title = f"{found.reader} {found.version} in {found.dtype}, greedy, against the written weights in float32"
    table = Table(title=title, title_justify="left")
    for heading in ("prompt", "tokens", "near ties", "difference"):
        table.add_column(heading, justify="left" if heading == "difference" else "right")
    for number, one in enumerate(found.prompts, start=1):
        table.add_row(str(number), str(one.tokens), str(one.near_ties), one.difference or "none")
    console().print(table)
