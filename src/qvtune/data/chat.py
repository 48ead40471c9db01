"""Conversations -> texts to train on, rendered by the tokenizer's chat template, and where the labels are in them."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qvtune.config.data import LossOn
from qvtune.data.rows import BadRowError, ChatRow, Message
from qvtune.errors import UserError

# Llama 3, SmolLM3 and others print today's date into the system prompt. The same rows must give the same tokens on any
# day, so templates see the date that Llama 3's own falls back to, in whatever format they ask for. transformers passes
# no functions on to templates, hence the macro; the line break belongs to it and is not printed.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"

CUT = "\ufdd0"
"""In a rendered text: what is before it and what is after it are tokenized apart. No character: Unicode says so."""

_NOT_SHOWN = "answer that the chat template does not show"

Span = tuple[int, int]


@dataclass(frozen=True)
class LabelledText:
    """A text in which the tokens of ``spans`` have labels: ranges of characters, in order. It may hold ``CUT``."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class _Chat:
    """What a template is given."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None

    def first(self, num_messages: int) -> "_Chat":
        return _Chat(self.messages[:num_messages], self.tools)


class ChatTemplate:
    """The chat template of a tokenizer.

    Special tokens between turns (`<|im_end|>`) and the tokenizer's bos, eos, pad and unk tokens are tokens only where
    the template writes them. Spelled out in a message they are text, which ``CUT`` divides: an answer that explains
    `<|im_end|>` must not teach the model to stop there, and no message can forge a turn. Any other added token in a
    message (`<think>`, `<tool_call>`) is that token, as it is when the model writes it.

    Raises UserError if the tokenizer has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "The rows are conversations, but the tokenizer has no chat template. Use an instruction-tuned model, "
                "put a chat_template.jinja into the model folder, or give prompt/completion rows."
            )
        self._tokenizer = tokenizer
        self._template = FIXED_DATE + tokenizer.get_chat_template()
        self._with_tools = FIXED_DATE + tokenizer.get_chat_template(tools=[{}])
        added = tokenizer.added_tokens_decoder.values()
        self._added = tuple(token.content for token in added)
        names = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token} - {None}
        turns = self._between_turns()
        tokens = {*names, *(token.content for token in added if token.special and token.content in turns)}
        longest_first = sorted((re.escape(str(token)) for token in tokens), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first) or "(?!)")  # the latter matches nothing

    def texts(self, row: ChatRow, loss_on: LossOn) -> list[LabelledText]:
        """What to train on: one text, or several where the template changes earlier turns when later ones are added.

        With ``answers`` and ``last_answer`` labels are on what the model generates after a generation prompt, including
        the end-of-turn token, and before them is exactly what the model sees at inference. ``completion``: all that
        follows the row's prompt and a generation prompt. ``all``: the whole conversation, as the template shows it.

        Raises BadRowError if the template refuses the row, or does not show an answer as it is.
        """
        chat = _Chat(self._cut(row.messages), self._cut(row.tools))
        whole = self._render(chat)
        if CUT in whole and whole.replace(CUT, "") != self._render(_Chat(row.messages, row.tools)):
            reason = "the chat template changes special tokens that are spelled out in a message"
            raise BadRowError(reason, "special tokens in a message")
        if loss_on == "all":
            return [LabelledText(whole, [(0, len(whole))])]
        replies = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
        replies = [index for index in replies if index >= row.first_reply]
        if loss_on == "completion" and row.first_reply < len(row.messages) - 1:
            return [self._completion(chat, row.first_reply, whole)]
        texts: dict[str, list[Span]] = {whole: []}
        for index in reversed(replies if loss_on != "last_answer" else replies[-1:]):
            text, span = self._answer(chat, index, whole)
            longer = next((other for other in texts if other.startswith(text)), text)
            texts.setdefault(longer, []).insert(0, span)
        return [LabelledText(text, spans) for text, spans in reversed(texts.items()) if spans]

    def end_of_answer(self) -> str | None:
        """The token with which a model that was trained on this template ends an answer; None where there is none."""
        question, answer = ({"role": role, "content": f"the first {role}"} for role in ("user", "assistant"))
        try:
            text, (_, end) = self._answer(_Chat((question, answer)), 1, self._render(_Chat((question, answer))))
        except BadRowError:  # a template for other conversations than this one
            return None
        return max((token for token in self._added if text[:end].endswith(token)), key=len, default=None)

    def _render(self, chat: _Chat, generation_prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(chat.messages),
                tools=None if chat.tools is None else list(chat.tools),
                chat_template=self._with_tools if chat.tools else self._template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
        ) as error:  # TypeError: the template adds None to a text, and so on
            reason = f"the tokenizer's chat template refuses it: {error}"
            raise BadRowError(reason, "refused by the chat template") from error
        assert isinstance(text, str)
        return text

    def _between_turns(self) -> str:
        """What the template writes between and around the turns of a short conversation, after the first question."""
        question, answer = ({"role": role, "content": f"the first {role}"} for role in ("user", "assistant"))
        try:
            text = self._render(_Chat((question, answer, question)), generation_prompt=True)
        except BadRowError:
            return ""  # a template for other conversations than this one; rows will tell
        return text.partition(question["content"])[2]

    def _cut(self, value: Any) -> Any:
        """The same value, with special tokens cut after their first character in every text."""
        if isinstance(value, str):
            if CUT in value:
                raise BadRowError("it holds U+FDD0, which is no character", "not a character")
            return self._special.sub(lambda found: found[0][0] + CUT + found[0][1:], value)
        if isinstance(value, dict):
            return {self._cut(key): self._cut(item) for key, item in value.items()}
        return [self._cut(item) for item in value] if isinstance(value, list | tuple) else value

    def _completion(self, chat: _Chat, first_reply: int, whole: str) -> LabelledText:
        """A completion of several messages; all of them have labels."""
        begins_with_answer = chat.messages[first_reply]["role"] == "assistant"
        before = self._render(chat.first(first_reply), generation_prompt=begins_with_answer)
        shown = whole[len(before) :]
        if not whole.startswith(before) or any(_missing(shown, one) is not None for one in chat.messages[first_reply:]):
            reason = "the chat template does not show a completion of several messages after its prompt, as it is"
            raise BadRowError(reason, _NOT_SHOWN)
        return LabelledText(whole, [(len(before), self._end_of_turn(whole, len(before)))])

    def _answer(self, chat: _Chat, index: int, whole: str) -> tuple[str, Span]:
        """The conversation up to the end of answer ``index``, and the answer's place in it."""
        message = chat.messages[index]
        before = self._render(chat.first(index), generation_prompt=True)
        after = whole if index == len(chat.messages) - 1 else self._render(chat.first(index + 1))
        if not after.startswith(before) or _missing(after[len(before) :], message) is not None:
            after = self._with_thinking(before, after, message)
        return after, (len(before), self._end_of_turn(after, len(before)))

    def _with_thinking(self, before: str, after: str, message: Message) -> str:
        """``after`` with the thinking that the template removes from every answer, as DeepSeek-R1's does.

        At inference the model writes the thinking, and the generation prompt ``before`` may have opened it.
        """
        content = message["content"] if isinstance(message.get("content"), str) else ""
        start = _start_of_answer(before, after, content)
        shown = after[start : self._end_of_turn(after, start)]
        end = max((token for token in self._added if shown.endswith(token)), key=len, default=None)
        kept = shown.removesuffix(end or "")
        if start < 0 or end is None or _extras(message) or not content.strip().endswith(kept.strip()):
            raise _not_shown(before, after, message)
        answer = content[len(before) - start :].rstrip() + kept[len(kept.rstrip()) :]
        return before + answer + after[start + len(kept) :]

    def _end_of_turn(self, text: str, start: int) -> int:
        """Exclude the line break that many templates put after the end-of-turn token: generation stops before it."""
        stripped = text.rstrip()
        return len(stripped) if len(stripped) > start and stripped.endswith(self._added) else len(text)


def num_shared(one: str, other: str) -> int:
    """How many characters two texts have in common at the start."""
    differing = (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differing, min(len(one), len(other)))


def _start_of_answer(before: str, after: str, content: str) -> int:
    """Where the answer begins in ``after``: at the end of ``before``, or where that opens the thinking; -1: nowhere."""
    shared = num_shared(before, after)
    places = range(shared, max(len(before) - len(content), 0) - 1, -1)
    return next((place for place in places if content.startswith(before[place:])), -1)


def _not_shown(before: str, after: str, message: Message) -> BadRowError:
    if after.startswith(before):
        text = str(_missing(after[len(before) :], message)).replace(CUT, "")
        return BadRowError(f"the chat template does not show {text[:40]!r} of an answer, or not as it is", _NOT_SHOWN)
    reason = (
        f"the generation prompt of the chat template ends with {before[-30:]!r}, but the answer does not follow it, so "
        "the model would be trained on another context than it has at inference"
    )
    return BadRowError(reason, "another context than at inference")


def _extras(message: Message) -> list[str]:
    """Texts of a message beside its ``content``: thinking, names and arguments of functions that it calls."""
    texts = [message.get("reasoning_content") or ""]
    for call in message.get("tool_calls") or ():
        function = call["function"] if isinstance(call.get("function"), dict) else call
        texts += [*_leaves(function.get("name")), *_leaves(_parsed(function.get("arguments")))]
    return [text for text in texts if text.strip()]


def _leaves(value: Any) -> Iterator[str]:
    """Keys and texts of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _parsed(arguments: Any) -> Any:
    """Arguments of a function, which may be JSON in a text."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        return arguments


def _missing(answer: str, message: Message) -> str | None:
    """A text of a message that is not in the rendered answer. Templates trim, and some texts they write as JSON."""
    content = message.get("content")
    texts = [content] if isinstance(content, str) else []
    dense = ""
    for text in texts + _extras(message):
        if text in answer:
            continue
        dense = dense or "".join(answer.split())
        if not any("".join(one.split()) in dense for one in (text, json.dumps(text, ensure_ascii=False)[1:-1])):
            return text
    return None
