import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvtune.data.rows import ChatRow, TextRow, file_sha256, read_rows
from qvtune.errors import UserError

QUESTION = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
CHAT = {"messages": [QUESTION, ANSWER]}
PAIR = {"prompt": "2 + 2 =", "completion": " 4"}

WriteJsonl = Callable[..., Path]


def read(path: Path, format: str = "auto", on_bad_row: str = "error") -> tuple[list[Any], int]:
    return read_rows(path, format, on_bad_row)


def problems_of(path: Path, **settings: str) -> tuple[str, ...]:
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
    assert isinstance(read(path)[0][0], ChatRow)
    assert isinstance(read(path, format="prompt_completion")[0][0], TextRow)


def test_byte_order_mark_and_windows_line_ends(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(b'\xef\xbb\xbf{"prompt": "a", "completion": "\xc3\xa9"}\r')
    rows, _ = read(path)
    assert rows == [TextRow(f"{path}:1", "a", "é")]


BAD_ROWS = [
    ('{"messages": [', "not JSON: Expecting value at column 15"),
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 13 of the line"),
    ("[" * 100_000, "not usable JSON"),
    ("[1]", "a JSON list, but each line must be a JSON object"),
    ("null", "a JSON null, but"),
    ({"text": "hi"}, "the keys are ['text'], but it needs `messages`, `conversations`, or `prompt` and `completion`"),
    ({"prompt": "hi"}, "the keys are ['prompt'], but"),
    ({"messages": []}, "`messages` must be a list of at least one message"),
    ({"messages": "hi"}, "`messages` must be a list"),
    ({"messages": ["hi"]}, "`messages[0]` must be an object, found string"),
    (
        {"messages": [QUESTION, {"role": "bot", "content": "4"}]},
        '`messages[1].role` is "bot", allowed are system, user',
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
        '`conversations[0].from` is "user", allowed are system, human',
    ),
    ({"conversations": [{"from": "human", "value": {}}]}, "`conversations[0].value` must be text, found object"),
    ({"prompt": 1, "completion": "x"}, "`prompt` must be text, found number"),
    ({"prompt": [QUESTION], "completion": "x"}, "`prompt` must be text, found list"),
    ({"prompt": [QUESTION], "completion": [QUESTION]}, "no message of the assistant"),
    ({"prompt": "x", "completion": " "}, "`completion` is empty"),
    ('{"prompt": "x", "completion": "a\\ud800"}', "`completion` holds half a surrogate pair at character 2"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason for _, reason in BAD_ROWS])
def test_a_bad_row_is_named_by_file_line_and_reason(row: Any, reason: str, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl("", row, CHAT)
    problem, advice = problems_of(path)
    assert problem.startswith(f"{path}:2: {reason}")
    assert advice == "1 rows are good; data.on_bad_row=skip skips the bad ones."
    rows, num_skipped = read(path, on_bad_row="skip")
    assert (rows, num_skipped) == ([ChatRow(f"{path}:3", (QUESTION, ANSWER))], 1)


def test_formats_must_not_mix(write_jsonl: WriteJsonl) -> None:
    (problem, _) = problems_of(write_jsonl("x", CHAT, PAIR), on_bad_row="error")[1:]
    assert ":3: a prompt_completion row, but data.format (or, with auto, the first good row) is chat" in problem
    assert len(read(write_jsonl(PAIR, CHAT, PAIR), on_bad_row="skip")[0]) == 2


def test_the_first_ten_of_many_bad_rows_are_listed(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(CHAT, *["x"] * 13)
    problems = problems_of(path)
    assert [problem.split(": ")[0] for problem in problems[:10]] == [f"{path}:{line}" for line in range(2, 12)]
    assert problems[10:] == ("3 more bad rows in the file. 1 rows are good; data.on_bad_row=skip skips the bad ones.",)


def test_skipping_every_row_is_an_error(write_jsonl: WriteJsonl) -> None:
    assert problems_of(write_jsonl("x"), on_bad_row="skip")[-1] == "No row is good."


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_rows(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    assert problems_of(path, on_bad_row="skip") == (f"{path} has no rows; it must hold one JSON object per line.",)


@pytest.mark.parametrize(("name", "reason"), [("missing.jsonl", "No such file"), ("", "Is a directory")])
@pytest.mark.parametrize("function", [read, file_sha256])
def test_a_file_that_cannot_be_read(name: str, reason: str, function: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(UserError, match=f"^cannot read {re.escape(str(path))}: {reason}"):
        function(path)


def test_file_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "abc") == expected
