"""launch/train.py --show-batch as it is typed."""

import json
import re

import pytest

from qvtune.train.show_batch import CLOSE, OPEN
from tests.launch.conftest import command, train_forked
from tests.support.forks import fork_ranks
from tests.support.lab import Lab


def test_rows_and_statistics_are_printed_and_nothing_else_happens(lab: Lab) -> None:
    """Without the base's weights too."""
    without_weights = lab.folder / "only-tokenizer"
    without_weights.mkdir()
    for file in (lab.folder / "model").iterdir():
        if file.suffix != ".safetensors":
            (without_weights / file.name).write_bytes(file.read_bytes())
    ended = train_forked(lab, "show", f"model.name_or_path={without_weights}", "--show-batch")
    assert (ended.code, ended.stderr) == (0, ""), ended.output
    assert "step 1, row 1 of 6: " in ended.stdout and "step 1, row 2 of 6: " in ended.stdout
    assert "row 3 of 6" not in ended.stdout
    assert ended.stdout.count(OPEN) > 2
    assert "data.train: lengths of documents" in ended.stdout and "data.eval: lengths of documents" in ended.stdout
    assert not lab.run_dir("show").exists()


def test_data_as_it_is_published(lab: Lab) -> None:
    """ShareGPT and Alpaca as lists of objects, texts as a folder, a table with names of its own."""
    folder = lab.folder / "published"
    (folder / "texts").mkdir(parents=True)
    turns = [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Hello to you"}]
    (folder / "sharegpt.json").write_text(json.dumps([{"id": "a_0", "conversations": turns}], indent=2))
    alpaca = {"instruction": "Add the numbers.", "input": "2 and 2", "output": "It is 4"}
    (folder / "alpaca.json").write_text(json.dumps([alpaca], indent=4))
    (folder / "texts/one.txt").write_text("word " * 99)
    (folder / "table.csv").write_text('question,answer\n"What, then?",Nothing\n')
    chats = f"data.train={folder}/sharegpt.json", f"data.eval={folder}/alpaca.json"
    columns = "{prompt: question, completion: answer}"
    texts = f"data.train={folder}/texts", f"data.eval={{path: {folder}/table.csv, columns: {columns}}}"
    of_chats, of_texts = (train_forked(lab, "published", *words, "--show-batch=9") for words in (chats, texts))
    assert (of_chats.code, of_texts.code) == (0, 0), of_chats.output + of_texts.output
    assert f"Hi there<|im_end|>\n<|im_start|>assistant\n{OPEN}Hello to you<|im_end|>{CLOSE}" in of_chats.stdout
    assert "It is 4<|im_end|>" in of_chats.stdout  # what is trained on in the longest document
    assert re.search(f"{OPEN}[^{CLOSE}]*word word word", of_texts.stdout)
    assert "Nothing<|im_end|>" in of_texts.stdout


def test_under_a_launcher_rank_0_shows_it(lab: Lab) -> None:
    words = command(lab, "show-ranks", "--show-batch=7")
    first, second = fork_ranks(words, 2, lab.folder / "output" / "show-ranks", timeout=240, **lab.environment)
    assert (first.code, second.code) == (0, 0), first.output + second.output
    assert "step 2, row 1 of 6: " in first.stdout and second.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train={folder}/bad.jsonl"], "error: data.train: {folder}/bad.jsonl:1: not JSON"),
        (["data.eval={folder}/none.jsonl"], "error: data.eval: cannot read {folder}/none.jsonl"),
        (["data.max_lenth=3"], "error: command line, `data.max_lenth=3`: `data.max_lenth` is not a setting"),
    ],
)
def test_mistakes_are_those_of_training(lab: Lab, arguments: list[str], message: str) -> None:
    (lab.folder / "bad.jsonl").write_text("{")
    words = [word.format(folder=lab.folder) for word in arguments]
    shown, trained = train_forked(lab, "bad", *words, "--show-batch"), train_forked(lab, "worse", *words)
    assert shown.code == trained.code == 2
    assert shown.stderr == trained.stderr
    assert message.format(folder=lab.folder) in shown.stderr
