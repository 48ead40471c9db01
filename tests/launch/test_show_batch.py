"""launch/train.py --show-batch as it is typed."""

import pytest

from qvtune.train.show_batch import OPEN
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
