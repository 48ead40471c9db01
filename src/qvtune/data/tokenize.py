"""Rows -> token ids and labels: the assistant's turns, or the completion."""

from bisect import bisect_right
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qvtune.data import IGNORE_INDEX
from qvtune.data.rows import BadRowError, ChatRow, LabelledRow, Message, PlainTextRow, Row, TextRow
from qvtune.errors import UserError

# Llama 3, SmolLM3 and others print today's date into the system prompt. The same rows must give the same tokens on any
# day, so templates see the date that Llama 3's own falls back to, in whatever format they ask for. transformers passes
# no functions on to templates, hence the macro; the line break belongs to it and is not printed.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"

Span = tuple[int, int]


@dataclass(frozen=True)
class Document:
    """One tokenized row; ``labels`` are not shifted: labels[t] is ids[t] or IGNORE_INDEX, the latter at t = 0."""

    ids: list[int]
    labels: list[int]
    truncated: bool


def tokenize_row(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Document | None:
    """Return the first ``max_length`` tokens of a row with their labels, or None if none of them has a label.

    Conversation: rendered by the tokenizer's chat template; labels are on what the model generates after a generation
    prompt, including the end-of-turn token. Text: tokens(prompt) + tokens(completion) + end of sequence, tokenized
    separately, because at inference the prompt is tokenized alone; labels are on what follows the prompt. Special
    tokens that are spelled out in a row's text are special tokens, as in `apply_chat_template`.

    Raises BadRowError if the template refuses the row, and UserError if tokenizer and rows do not go together.
    """
    if isinstance(row, PlainTextRow | LabelledRow):
        raise BadRowError(f"rows of the kind {type(row).__name__} cannot be trained on by task causal_lm")
    ids, labels = _tokenize_chat(row, tokenizer) if isinstance(row, ChatRow) else _tokenize_text(row, tokenizer)
    labels[0] = IGNORE_INDEX  # there is no token before it to predict it from
    truncated = len(ids) > max_length
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORE_INDEX for label in labels):
        return None
    return Document(ids, labels, truncated)


def _tokenize_text(row: TextRow, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "The tokenizer has no eos_token, with which every completion must end. Set it in the model folder's "
            "tokenizer_config.json."
        )
    prompt: list[int] = tokenizer(row.prompt, verbose=False)["input_ids"]
    if prompt and prompt[-1] == end and not row.prompt.endswith(str(tokenizer.eos_token)):
        prompt = prompt[:-1]  # some tokenizers append it to each text
    completion: list[int] = tokenizer(row.completion, add_special_tokens=False, verbose=False)["input_ids"]
    labelled = [*completion, end]
    return prompt + labelled, [IGNORE_INDEX] * len(prompt) + labelled


def _tokenize_chat(row: ChatRow, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if not tokenizer.chat_template:
        raise UserError(
            "The rows are conversations, but the tokenizer has no chat template. Use an instruction-tuned model, put a "
            "chat_template.jinja into the model folder, or give prompt/completion rows."
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer ({type(tokenizer).__name__}) does not tell which characters a token covers, which the "
            "label mask of conversations needs. Put a tokenizer.json into the model folder."
        )
    text = _render(tokenizer, row.messages, generation_prompt=False)
    spans = _label_spans(row, text, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    starts = [start for start, _ in spans]
    labels = []
    for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True):
        nearest = spans[max(bisect_right(starts, max(start, end - 1)) - 1, 0)]
        labels.append(token if _is_within(text, start, end, nearest) else IGNORE_INDEX)
    return ids, labels


def _render(tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...], generation_prompt: bool) -> str:
    template = FIXED_DATE + tokenizer.get_chat_template()
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=generation_prompt, tokenize=False
        )
    except TemplateError as error:
        raise BadRowError(f"the tokenizer's chat template refuses it: {error}") from error
    assert isinstance(text, str)
    return text


def _label_spans(row: ChatRow, text: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Return the character ranges of ``text`` that the model has to generate, in order."""
    spans = []
    for index, message in enumerate(row.messages):
        if message["role"] != "assistant" or index < row.first_reply:
            continue
        before = _render(tokenizer, row.messages[:index], generation_prompt=True)
        after = _render(tokenizer, row.messages[: index + 1], generation_prompt=False)
        if not (text.startswith(after) and after.startswith(before)):
            raise _unstable_template(row, index)
        spans.append((len(before), _end_of_turn(after, len(before), tokenizer)))
    return spans


def _end_of_turn(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Exclude the line break that many templates put after the end-of-turn token: generation stops before it."""
    stripped = text.rstrip()
    control_tokens = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    return len(stripped) if len(stripped) > start and stripped.endswith(control_tokens) else len(text)


def _is_within(text: str, start: int, end: int, span: Span) -> bool:
    """Whether the token of characters [start, end) belongs to ``span``; only its white space may cross the border."""
    first, last = span
    if start == end:  # byte-level tokenizers may report white space as the empty range after it
        return first < start <= last
    if first <= start and end <= last:
        return True
    if end <= first or last <= start:
        return False
    core = text[start:end].strip()
    if not core:
        return False
    core_start = text.index(core, start)
    core_end = core_start + len(core)
    if core_end <= first or last <= core_start:
        return False
    if first <= core_start and core_end <= last:
        return True
    raise UserError(
        f"The tokenizer joins {core!r} into one token, only a part of which is the assistant's text. The chat template "
        "must separate the assistant's text from its own by a special token or white space."
    )


def _unstable_template(row: ChatRow, index: int) -> UserError:
    return UserError(
        "The chat template of the tokenizer changes earlier messages when later ones are added ("
        f"{row.place}, message {index}), so the model would be trained on another context than it has at inference. "
        "Put a chat_template.jinja into the model folder that only appends, or give rows with one answer each."
    )
