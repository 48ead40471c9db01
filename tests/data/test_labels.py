"""What the loss covers in conversations, for the chat templates that people use."""

import json
import random
import re
import unicodedata
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qvtune.data import IGNORE_INDEX
from qvtune.data.chat import FIXED_DATE
from qvtune.data.encode import Piece
from qvtune.data.rows import BadRowError, ChatRow
from qvtune.data.tokenize import Document, tokenize_rows
from tests.support.chat_families import FAMILIES, Family, family_of

NUM_CHATS, MAX_TURNS = 200, 9
WORDS = (
    "hello", "world", " the answer", " is", " 42", "3.14159", "\n", "\n\n", "  ", " ", "\t", "def f(x):\n    return x",
    "naïve", "e\u0301", "東京", "😀", "👩‍👩‍👧", "مرحبا", "!?", "...",
    "|", "<", ">", "[INST", "user", "assistant", "</", '"',
)  # fmt: skip
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather of a city", "parameters": {}}}


def text(rng: random.Random, family: Family, most: int = 8) -> str:
    """Maybe empty, maybe with white space at its ends, one time in three with strings of the template."""
    words = [*WORDS, *family.spoofs] if rng.random() < 0.35 else WORDS
    return "".join(rng.choice(words) for _ in range(rng.choice((0, 1, 3, most))))


def chat(rng: random.Random, family: Family, place: str) -> ChatRow:
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": text(rng, family)})
    tools = (TOOL,) if family.max_calls and rng.random() < 0.5 else None
    for _ in range(rng.randint(1, MAX_TURNS)):
        messages.append({"role": "user", "content": text(rng, family)})
        while tools and rng.random() < 0.4:
            messages += exchange_with_tools(rng, family)
        messages.append(with_thinking(rng, family, {"role": "assistant", "content": text(rng, family)}))
    return ChatRow(place, tuple(messages), tools=tools)


def exchange_with_tools(rng: random.Random, family: Family) -> list[dict[str, Any]]:
    num_calls = rng.randint(1, family.max_calls)
    arguments = [{"city": text(rng, family), "days": rng.randint(0, 9)} for _ in range(num_calls)]
    calls = [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "arguments": json.dumps(one, ensure_ascii=False) if family.json_arguments else one,
            },
        }
        for one in arguments
    ]
    message = with_thinking(rng, family, {"role": "assistant", "content": "", "tool_calls": calls})
    return [message, *({"role": "tool", "content": text(rng, family)} for _ in calls)]


def with_thinking(rng: random.Random, family: Family, message: dict[str, Any]) -> dict[str, Any]:
    if family.thinking and (family.always_thinks or rng.random() < 0.6):
        thoughts = text(rng, family).strip("\n") or "hm"
        if "tool_calls" in message and "reasoning_content" not in family.thinking:
            return message  # such a template shows a message with calls, but not its thinking
        if "tool_calls" not in message and rng.choice(family.thinking) == "content":
            content = f"<think>\n{thoughts}\n</think>\n\n{message['content'].lstrip()}"
            return message | {"content": content}
        return message | {"reasoning_content": thoughts}
    return message


def trained(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """What is before each run of label tokens, without white space, and the run, decoded in its context."""
    found = []
    has_label = [label != IGNORE_INDEX for label in document.labels]
    starts = [place for place, one in enumerate(has_label) if one and not has_label[place - 1]]
    for start in starts:
        end = next((place for place in range(start, len(has_label)) if not has_label[place]), len(has_label))
        before = tokenizer.decode(document.ids[:start], clean_up_tokenization_spaces=False)
        until = tokenizer.decode(document.ids[:end], clean_up_tokenization_spaces=False)
        assert until.startswith(before)
        found.append((dense(before), until[len(before) :]))
    return found


def expected(row: ChatRow, family: Family, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """Of each answer the prompt that inference makes, without white space, and the answer."""
    is_composed = "NFC" in repr(tokenizer.backend_tokenizer.normalizer)
    found = []
    for index, message in enumerate(row.messages):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(
                list(row.messages[:index]),
                tools=row.tools,
                chat_template=FIXED_DATE + family.template,
                add_generation_prompt=True,
                tokenize=False,
            )
            answer = family.answer(message)
            found.append((dense(str(prompt)), unicodedata.normalize("NFC", answer) if is_composed else answer))
    return found


def dense(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_are_exactly_the_answers_after_what_the_model_sees_at_inference(name: str) -> None:
    family = family_of(name)
    rng, tokenizer = random.Random(name), family.make_tokenizer()
    rows = [chat(rng, family, f"rows.jsonl:{number}") for number in range(NUM_CHATS)]
    num_divided = 0
    for row, documents in zip(rows, tokenize_rows(rows, tokenizer, "answers"), strict=True):
        assert isinstance(documents, list), (row, documents)
        num_divided += len(documents) > 1
        found = [one for document in documents for one in trained(document, tokenizer)]
        assert sorted(found) == sorted(expected(row, family, tokenizer)), row
    assert num_divided > 0 if family.divides else num_divided == 0


@pytest.mark.parametrize("tokens", [-1, 1])
def test_labels_that_are_one_token_off_are_refused(
    tokens: int, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The proof of each row, without the places that it proves."""
    row = ChatRow(
        "rows.jsonl:1", ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "world it is"})
    )
    assert isinstance(tokenize_rows([row], tokenizer, "answers")[0], list)
    labelled = Piece.labelled
    monkeypatch.setattr(
        Piece, "labelled", lambda piece, span: slice(labelled(piece, span).start + tokens, labelled(piece, span).stop)
    )
    [refused] = tokenize_rows([row], tokenizer, "answers")
    assert isinstance(refused, BadRowError)
    assert "decode to" in str(refused)


def test_special_tokens_spelled_out_in_messages_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    contents = ("What ends a turn, <|im_end|>?", "It is <|im_end|>\n<|im_start|>user\nYes.", "<|im_start|>", "yes")
    roles = ("user", "assistant") * 2
    messages = tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=True))
    [documents] = tokenize_rows([ChatRow("rows.jsonl:1", messages)], tokenizer, "answers")
    assert isinstance(documents, list)
    [document] = documents
    assert tokenizer.decode(document.ids) == tokenizer.apply_chat_template(list(messages), tokenize=False)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (document.ids.count(start), document.ids.count(end)) == (5, 5)  # of the template: system and four turns
    assert document.labels.count(end) == 2
    assert [answer for _, answer in trained(document, tokenizer)] == [f"{contents[1]}<|im_end|>", "yes<|im_end|>"]
    # transformers cuts around the whole token, we after its first character: here that is the same.
    assert document.ids == tokenizer.apply_chat_template(
        list(messages), sanitize_control_tokens=True, return_dict=False
    )


QWEN3, R1, R1_OPENED, LLAMA3 = "qwen3", "deepseek-r1", "deepseek-r1, thinking opened", "llama3"
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}


@pytest.mark.parametrize(
    ("name", "answer", "reason"),
    [
        (
            R1_OPENED,
            {"content": "no thinking"},
            r"ends with '.*<think>\\n', but the answer does not",
        ),
        (R1, {"content": "yes", "reasoning_content": "hm"}, "does not show 'hm' of an answer"),
        (QWEN3, {"content": "lost <think>hm</think> yes"}, "does not show 'lost <think>hm"),
        (LLAMA3, {"content": "lost", "tool_calls": [CALL]}, "does not show 'lost' of an answer"),
        (LLAMA3, {"content": "", "tool_calls": [CALL, CALL]}, "refuses it: one tool call at a time"),
        ("smollm2", {"content": "yes", "tool_calls": [CALL]}, "does not show 'get_weather' of an answer"),
        ("smollm2", {"content": "yes \ufdd0"}, "U\\+FDD0"),
        ("llama2", {"content": "a ▁ is a space there"}, "decode to"),
    ],
)
def test_what_cannot_be_proved_refuses_the_row_and_no_other(name: str, answer: dict[str, Any], reason: str) -> None:
    family = family_of(name)
    good = {"content": "<think>\nhm\n</think>\n\nyes"} if family.always_thinks else {"content": "yes"}
    rows = [
        ChatRow(f"rows.jsonl:{line}", ({"role": "user", "content": "hello"}, {"role": "assistant", **message}))
        for line, message in enumerate((good, answer, good), start=1)
    ]
    first, refused, last = tokenize_rows(rows, family.make_tokenizer(), "answers")
    assert isinstance(refused, BadRowError)
    assert re.search(reason, str(refused))
    assert refused.kind != "other"
    assert isinstance(first, list)
    assert first == last


def test_answers_with_the_same_context_share_a_document() -> None:
    """Qwen3 keeps the thinking of all answers since the last question."""
    thinking = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    messages = (
        {"role": "user", "content": "hello"},
        {**thinking, "content": "yes"},
        {"role": "user", "content": "the weather?"},
        {**thinking, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {**thinking, "content": "Sunny."},
    )
    tokenizer = family_of(QWEN3).make_tokenizer()
    [documents] = tokenize_rows([ChatRow("rows.jsonl:1", messages, tools=(TOOL,))], tokenizer, "answers")
    assert isinstance(documents, list)
    assert [len(trained(document, tokenizer)) for document in documents] == [1, 2]
