"""Rows of every format, good and bad, from JSONL files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvtune.config.data import SourceSection
from qvtune.data.rows import BadRows, ChatRow, LabelledRow, PlainTextRow, TextRow
from qvtune.data.sources.source import open_source, read_rows
from qvtune.errors import UserError

QUESTION = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
CHAT = {"messages": [QUESTION, ANSWER]}
PAIR = {"prompt": "2 + 2 =", "completion": " 4"}

WriteJsonl = Callable[..., Path]


def read(path: Path, format: str = "auto", on_bad_row: str = "error", **columns: str) -> tuple[list[Any], int]:
    bad = BadRows(str(path), on_bad_row)
    source = SourceSection.model_validate({"path": str(path), "format": format, "columns": columns})
    rows = list(read_rows(open_source(source), bad))
    bad.check(len(rows))
    return rows, bad.count


def problems_of(path: Path, **settings: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    return caught.value.problems


def test_chat_rows_with_line_numbers_and_blank_lines(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(CHAT, "", "  ", {**CHAT, "source": "extra keys do not matter"})
    rows, num_skipped = read(path)
    assert rows == [ChatRow(f"{path}:1", (QUESTION, ANSWER)), ChatRow(f"{path}:4", (QUESTION, ANSWER))]
    assert num_skipped == 0


def test_sharegpt_rows_equal_chat_rows(write_jsonl: WriteJsonl) -> None:
    turns = [("system", "Add."), ("human", "2 + 2?"), ("gpt", "4")]
    path = write_jsonl({"conversations": [{"from": role, "value": text} for role, text in turns]})
    rows, _ = read(path)
    assert rows == [ChatRow(f"{path}:1", ({"role": "system", "content": "Add."}, QUESTION, ANSWER))]


def test_prompt_completion_as_text_and_as_messages(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(PAIR, {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]})
    rows, _ = read(path)
    assert rows == [
        TextRow(f"{path}:1", "2 + 2 =", " 4"),
        ChatRow(f"{path}:2", (QUESTION, ANSWER, QUESTION, ANSWER), first_reply=3),
    ]


def test_a_row_with_both_formats_follows_the_setting(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl({**CHAT, **PAIR})
    assert isinstance(read(path, format="chat")[0][0], ChatRow)
    assert isinstance(read(path, format="prompt_completion")[0][0], TextRow)


def test_byte_order_mark_and_windows_line_ends(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(b'\xef\xbb\xbf{"prompt": "a", "completion": "\xc3\xa9"}\r')
    rows, _ = read(path)
    assert rows == [TextRow(f"{path}:1", "a", "é")]


GOOD = {  # in the text of a bad row -> a good row of its format
    '"prompt"': PAIR,
    '"instruction"': {"instruction": "2 + 2?", "output": "4"},
    '"label"': {"text": "good", "label": 1},
    '"text"': {"text": "good"},
}
BAD_ROWS = [
    ('{"messages": [', "not JSON: Expecting value at column 15"),
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 13 of the line"),
    ("[" * 100_000, "not usable JSON"),
    ("[1]", "a JSON list, but each line must be a JSON object"),
    ("null", "a JSON null, but"),
    (
        {"body": "hi"},
        "the keys are ['body'], but it needs `messages` or `conversations`; `columns` of the source says where",
    ),
    ({"prompt": "hi"}, "the keys are ['prompt'], but"),
    ({"messages": []}, "`messages` must be a list of at least one message"),
    ({"messages": "hi"}, "`messages` must be a list"),
    ({"messages": ["hi"]}, "`messages[0]` must be an object, found string"),
    (
        {"messages": [QUESTION, {"role": "bot", "content": "4"}]},
        '`messages[1].role` is "bot", allowed are system, user, assistant, tool',
    ),
    ({"messages": [{"content": "4"}]}, "`messages[0].role` is null, allowed are"),
    ({"messages": [{"role": ["user"], "content": "4"}]}, '`messages[0].role` is ["user"], allowed are'),
    ({"messages": [{"role": "user"}]}, "`messages[0].content` must be text, found null"),
    ({"messages": [{"role": "user", "content": 5}]}, "`messages[0].content` must be text, found number"),
    ({"messages": [QUESTION]}, "no message of the assistant"),
    ({"messages": [ANSWER]}, "the first message is the assistant's"),
    ({"messages": [QUESTION, {"role": "assistant", "content": " \n"}]}, "a message of the assistant is empty"),
    (
        {"conversations": [{"from": "user", "value": "x"}]},
        '`conversations[0].from` is "user", allowed are system, human, gpt, tool',
    ),
    ({"conversations": [{"from": "human", "value": {}}]}, "`conversations[0].value` must be text, found object"),
    ({"messages": "[{'role': 'user'}]"}, "`messages` is text that is no JSON list: Expecting property name"),
    ({"messages": [QUESTION, {"role": "assistant"}]}, "`messages[1].content` must be text, found null"),
    ({"messages": [QUESTION, {"role": "assistant", "tool_calls": "x"}]}, "`messages[1].tool_calls` must be a list of"),
    (
        {"messages": [QUESTION, {**ANSWER, "reasoning_content": 1}]},
        "`messages[1].reasoning_content` must be text, found n",
    ),
    ({**CHAT, "tools": ["x"]}, "`tools` must be a list of objects"),
    ({"prompt": 1, "completion": "x"}, "`prompt` must be text, found number"),
    ('{"prompt": NaN, "completion": "x"}', "`prompt` must be text, found NaN"),
    ({"instruction": "x", "output": None}, "`output` must be text, found null"),
    ({"instruction": " ", "output": "x"}, "`instruction` is empty"),
    ({"instruction": "x", "input": 1, "output": "x"}, "`input` must be text, found number"),
    ({"text": ""}, "`text` is empty"),
    ({"text": ["a"]}, "`text` must be text, found list"),
    ({"text": "x", "label": None}, "`label` must be text or a number, found null"),
    ('{"text": "x", "label": NaN}', "`label` must be text or a number, found NaN"),
    ({"text": "x", "label": ""}, "`label` must be text or a number, found empty text"),
    ({"text": "x", "label": 1, "text_pair": 2}, "`text_pair` must be text, found number"),
    ({"prompt": [QUESTION], "completion": "x"}, "`prompt` must be text, found list"),
    ({"prompt": [QUESTION], "completion": [QUESTION]}, "no message of the assistant"),
    ({"prompt": "x", "completion": " "}, "`completion` is empty"),
    ('{"prompt": "x", "completion": "a\\ud800"}', "`completion` holds half a surrogate pair at character 2"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason for _, reason in BAD_ROWS])
def test_a_bad_row_is_named_by_file_line_and_reason(row: Any, reason: str, write_jsonl: WriteJsonl) -> None:
    content = row if isinstance(row, str | bytes) else json.dumps(row)
    good = next((one for key, one in GOOD.items() if key in str(content)), CHAT)
    path = write_jsonl("", row, good)
    problem, advice = problems_of(path)
    assert problem.startswith(f"{path}:2: {reason}")
    assert advice == "1 rows are good; data.on_bad_row=skip skips the bad ones."
    (kept,), num_skipped = read(path, on_bad_row="skip")
    assert (kept.place, num_skipped) == (f"{path}:3", 1)


def test_formats_must_not_mix(write_jsonl: WriteJsonl) -> None:
    (problem, _) = problems_of(write_jsonl("x", CHAT, PAIR), on_bad_row="error")[1:]
    assert ":3: a prompt_completion row, but data.format (or, with auto, the first good row) is chat" in problem
    assert len(read(write_jsonl(PAIR, CHAT, PAIR), on_bad_row="skip")[0]) == 2


def test_the_first_ten_of_many_bad_rows_are_listed(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(CHAT, *["x"] * 13)
    problems = problems_of(path)
    assert [problem.split(": ")[0] for problem in problems[:10]] == [f"{path}:{line}" for line in range(2, 12)]
    assert problems[10:] == (
        "3 more bad rows in the source. 1 rows are good; data.on_bad_row=skip skips the bad ones.",
    )


def test_skipping_every_row_is_an_error(write_jsonl: WriteJsonl) -> None:
    assert problems_of(write_jsonl("x"), on_bad_row="skip")[-1] == "No row is good."


def test_the_last_line_that_was_not_written_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIR) + '\n{"prompt": "2 + 2 =", "comp')
    problem, advice = problems_of(path)
    assert problem.startswith(
        f"{path}:2: not JSON: Unterminated string starting at at column 23 (the file ends there, without a line end: "
    )
    assert problem.endswith("it may not be complete).") and "data.on_bad_row=skip" in advice


def test_a_file_of_bad_rows_only_is_read_to_its_end(write_jsonl: WriteJsonl) -> None:
    problems = problems_of(write_jsonl({"body": "a"}, {"messages": []}))
    assert len(problems) == 3 and problems[2] == "No row is good."
    assert problems[0].endswith(
        ":1: the keys are ['body'], but it needs `messages`, `conversations`, `prompt` and `completion`, `instruction` "
        "and `output`, `text`, or `text` and `label`; `columns` of the source says where they have other names."
    )


def test_bad_rows_are_counted_by_reason(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(CHAT, "x", "y", b"\xff", PAIR, {"body": 1}, {"messages": [QUESTION]}, {"messages": [ANSWER]})
    bad = BadRows(str(path), "skip")
    assert len(list(read_rows(open_source(SourceSection(path=str(path), format="auto")), bad))) == 1
    assert bad.kinds == {
        "not JSON": 2,
        "not UTF-8": 1,
        "another format": 1,
        "columns of no format": 1,
        "no answer": 2,
    }
    assert bad.count == 7


def test_a_conversation_with_tools_and_thinking(write_jsonl: WriteJsonl) -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    call = {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "add them", "weight": 1}
    result = {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"}
    path = write_jsonl(
        {"messages": [QUESTION, call, result, ANSWER], "tools": tools},
        {"messages": json.dumps([QUESTION, call, result, ANSWER]), "tools": json.dumps(tools)},
        {"messages": [QUESTION, {**ANSWER, "tool_calls": None}], "tools": []},
    )
    first, second, third = read(path)[0]
    taken = {"role": "assistant", "content": "", "tool_calls": calls, "reasoning_content": "add them"}
    assert first.messages == second.messages == (QUESTION, taken, result, ANSWER)
    assert first.tools == second.tools == tuple(tools)
    assert (third.messages, third.tools) == ((QUESTION, ANSWER), None)


def test_one_empty_answer_among_others_stays(write_jsonl: WriteJsonl) -> None:
    empty = {"role": "assistant", "content": ""}
    (row,) = read(write_jsonl({"messages": [QUESTION, empty, QUESTION, ANSWER]}))[0]
    assert row.messages == (QUESTION, empty, QUESTION, ANSWER)
    assert (
        "every message of the assistant is empty"
        in problems_of(write_jsonl({"messages": [QUESTION, empty, QUESTION, empty]}))[0]
    )


def test_an_instruction_is_a_conversation(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"instruction": "2 + 2?", "output": "4", "system": "Be brief."},
    )
    with_input = {"role": "user", "content": "Add.\n\n2 + 2"}
    assert read(path)[0] == [
        ChatRow(f"{path}:1", (with_input, ANSWER)),
        ChatRow(f"{path}:2", (QUESTION, ANSWER)),
        ChatRow(f"{path}:3", ({"role": "system", "content": "Be brief."}, QUESTION, ANSWER)),
    ]


def test_text_and_labelled_text(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl({"text": "once", "id": 3}, {"text": " upon\n"}, name="text.jsonl")
    assert read(path)[0] == [PlainTextRow(f"{path}:1", "once"), PlainTextRow(f"{path}:2", " upon\n")]
    labels = [0, "0", True, 3.5, "positive"]
    path = write_jsonl(
        *({"text": "a", "label": label, "text_pair": "b"} for label in labels), {"text": "a", "label": 1}
    )
    rows = read(path)[0]
    assert [row.label for row in rows] == ["0", "0", "true", "3.5", "positive", "1"]
    assert rows[0] == LabelledRow(f"{path}:1", "a", "b", "0") and rows[5].text_pair is None
    assert read(path, format="text")[0][0] == PlainTextRow(f"{path}:1", "a")


def test_columns_of_other_names(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl({"question": "2 + 2 =", "answer": " 4", "text": "not this"})
    assert read(path, prompt="question", completion="answer")[0] == [TextRow(f"{path}:1", "2 + 2 =", " 4")]
    assert read(path, text="answer")[0] == [PlainTextRow(f"{path}:1", " 4")]  # in the place of the file's own `text`
    swapped = write_jsonl({"prompt": " 4", "completion": "2 + 2 ="}, name="swapped.jsonl")
    assert read(swapped, prompt="completion", completion="prompt")[0] == [TextRow(f"{swapped}:1", "2 + 2 =", " 4")]


def test_a_column_that_is_not_there(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl({"question": "2 + 2 =", "answer": " 4"})
    assert problems_of(path, prompt="querstion", completion="answer")[0] == (
        f"{path}:1: it has no column 'querstion', which `columns` gives for prompt; its columns are "
        "['answer', 'question']."
    )


@pytest.mark.parametrize(
    ("row", "candidates"),
    [
        ({**CHAT, **PAIR}, "chat, prompt_completion"),
        ({**CHAT, "text": "a"}, "chat, text"),
        ({"instruction": "a", "input": "", "output": "b", "text": "c" * 99}, "instruction, text"),
        ({**PAIR, "text": "a", "label": 1}, "prompt_completion, labelled"),
    ],
)
def test_columns_of_several_formats_are_an_error_that_shows_the_row(
    row: dict[str, Any], candidates: str, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl("not JSON", row, CHAT)
    (problem,) = problems_of(path, on_bad_row="skip")
    assert problem.startswith(f"{path}:2: the columns are those of several formats: {candidates}; set data.format, or ")
    assert "The row is {" in problem and all(f"{name}: " in problem for name in row)
    assert len(problem) < 500
    for name in candidates.split(", "):
        assert read(write_jsonl(row), format=name)[1] == 0


def test_a_format_that_was_named_is_demanded(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(PAIR)
    assert "a prompt_completion row, but data.format" in problems_of(path, format="chat")[0]
    path = write_jsonl({"body": "a"})
    assert "but it needs `messages` or `conversations`; `columns`" in problems_of(path, format="chat")[0]
