"""Prompts have the tokens that training has before an answer; what has no prompt is refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qvtune.config.schema import RunConfig
from qvtune.data.rows import ChatRow, TextRow
from qvtune.data.tokenize import tokenize_rows
from qvtune.errors import UserError
from qvtune.train.prompts import Prompt, load_prompts

QUESTION, ANSWER = {"role": "user", "content": "what does it do"}, {"role": "assistant", "content": "it says hello"}
MORE = [{"role": "user", "content": "hello <|im_end|>"}, {"role": "assistant", "content": "world\n#### 3"}]
CHAT, TEXT = {"messages": [QUESTION, ANSWER, *MORE]}, {"prompt": "what is in the name", "completion": " world #### 3"}

UNUSABLE = {"messages": [{"role": "user", "content": "\ufdd0"}, ANSWER]}  # good until it is tokenized

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    def make(generate: dict[str, Any], rows: Sequence[dict[str, Any]], **data: Any) -> RunConfig:
        """A run on ``rows``, which are its evaluation rows, too."""
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return RunConfig.model_validate(
            {
                "run_dir": "runs/x",
                "data": {"train": str(path), "eval": str(path), **data},
                "train": {"max_steps": 1, "generate": generate},
            }
        )

    return make


def test_rows_up_to_their_last_answer(make_config: MakeConfig, tokenizer: Any) -> None:
    (prompt,) = load_prompts(make_config({"rows": 1}, [CHAT, CHAT]), tokenizer)
    row = ChatRow("", tuple(CHAT["messages"]))
    (document,) = tokenize_rows([row], tokenizer, "answers")[0]  # type: ignore[misc]
    assert prompt.ids == document.ids[: len(prompt.ids)]
    assert tokenizer.decode(document.ids[len(prompt.ids) :]).startswith("world\n#### 3<|im_end|>")
    assert (prompt.text, prompt.expected) == ("hello <|im_end|>", "world\n#### 3")


def test_rows_of_prompts_and_completions(make_config: MakeConfig, tokenizer: Any) -> None:
    ids = tokenizer(TEXT["prompt"])["input_ids"]
    found = load_prompts(make_config({"rows": 5}, [TEXT] * 2, loss_on="all"), tokenizer)
    assert found == [Prompt("what is in the name", ids, "world #### 3")] * 2, "as many as there are"


def test_rows_that_cannot_be_used_are_left_out(make_config: MakeConfig, tokenizer: Any) -> None:
    """Those of ``data.eval`` are read, counted or refused elsewhere."""
    found = load_prompts(make_config({"rows": 3}, [UNUSABLE, CHAT, CHAT]), tokenizer)
    assert [prompt.expected for prompt in found] == ["world\n#### 3"] * 2


def test_texts_are_messages_where_the_rows_are_conversations(
    make_config: MakeConfig, tokenizer: Any, tmp_path: Path
) -> None:
    ids = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=True)["input_ids"]
    file = tmp_path / "prompts.txt"
    file.write_text("what does it do\n\nhello\n")
    (one,) = load_prompts(make_config({"prompts": "what does it do"}, [CHAT]), tokenizer)
    two = load_prompts(make_config({"file": str(file)}, [CHAT]), tokenizer)
    assert one == Prompt("what does it do", ids, None) == two[0]
    assert [prompt.text for prompt in two] == ["what does it do", "hello"]


def test_texts_are_as_they_are_where_the_rows_are_texts(make_config: MakeConfig, tokenizer: Any) -> None:
    ids = tokenizer("hello")["input_ids"]
    assert load_prompts(make_config({"prompts": ["hello"]}, [TEXT]), tokenizer) == [Prompt("hello", ids, None)]
    row = TextRow("", "hello", " world")
    (document,) = tokenize_rows([row], tokenizer, "answers")[0]  # type: ignore[misc]
    assert document.ids[: len(ids)] == ids


@pytest.mark.parametrize(
    ("generate", "rows", "message"),
    [
        ({"file": "nowhere.txt"}, [TEXT], r"train\.generate\.file: nowhere\.txt: cannot be read"),
        ({"rows": 1}, [{"text": "hello"}], r"train\.generate\.rows: .*rows\.jsonl:1 is a row of text, in which there"),
        ({"prompts": ["hello", ""]}, [TEXT], r"train\.generate: prompt 2: the prompt is empty"),
        ({"prompts": ["\ufdd0"]}, [CHAT], r"train\.generate: prompt 1: .*no character"),
        ({"rows": 1}, [UNUSABLE, CHAT], r"train\.generate: none of the first 1 rows can be used"),
    ],
)
def test_what_gives_no_prompt_is_refused(
    make_config: MakeConfig, tokenizer: Any, generate: dict[str, Any], rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts(make_config(generate, rows), tokenizer)


def test_an_empty_file_is_refused(make_config: MakeConfig, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n \n")
    with pytest.raises(UserError, match=r"prompts\.txt has no prompts; it must have one per line"):
        load_prompts(make_config({"file": str(file)}, [TEXT]), tokenizer)
