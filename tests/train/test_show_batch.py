"""What launch/train.py --show-batch prints."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from qvtune.config.schema import RunConfig
from qvtune.data import IGNORE_INDEX
from qvtune.data.order import rows_of_step
from qvtune.data.spans import Span
from qvtune.errors import UserError
from qvtune.train.data import load_data
from qvtune.train.show_batch import CLOSE, OPEN, as_text, show_batch
from tests.support.tiny import make_model_folder


@pytest.fixture
def config(tmp_path: Path, llama_folder: Path) -> RunConfig:
    return make_config(tmp_path, llama_folder)


def make_config(folder: Path, model: Path, **data: Any) -> RunConfig:
    rows = [{"prompt": f"hello {index}", "completion": " world\n" * (1 + index % 5)} for index in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": str(model)},
            "data": {"train": str(folder / "rows.jsonl"), "max_length": 64, **data},
            "train": {"max_steps": 9, "global_batch_size": 2, "seed": 3},
            "run_dir": str(folder / "run"),
        }
    )


def shown(config: RunConfig, num_rows: int, capsys: pytest.CaptureFixture[str]) -> str:
    show_batch(config, num_rows)
    return capsys.readouterr().out


def test_the_first_rows_of_the_order_are_shown_with_exactly_their_labels(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(config, 3, capsys).partition("\ndata ")[0]
    rows, tokenizer = load_data(config).rows["data.train"], AutoTokenizer.from_pretrained(config.model.name_or_path)
    order = [index for step in (0, 1) for index in rows_of_step(step, 2, len(rows), 3)][:3]
    assert re.findall(
        r"^step (\d+), row (\d+) of 2: documents (\d+), tokens (\d+), label tokens (\d+) ", text, re.M
    ) == [
        (
            str(position // 2 + 1),
            str(position % 2 + 1),
            str(len(rows[index].document_lengths)),
            str(rows.num_tokens[index]),
            str(rows.num_label_tokens[index]),
        )
        for position, index in enumerate(order)
    ]
    documents = []
    for index in order:
        row = rows[index]
        documents += np.split(row.labels, np.cumsum(row.document_lengths)[:-1])
    expected = [tokenizer.decode(labels[labels != IGNORE_INDEX]) for labels in documents]
    assert len(expected) > 3
    assert re.findall(f"{OPEN}(.*?){CLOSE}", text, re.DOTALL) == ["like this", *expected]
    assert len(re.findall(r"^-- document \d+ of \d+: tokens \d+$", text, re.M)) == len(documents)


@pytest.mark.parametrize(
    ("problem", "labels", "expected"),
    [("single_label", ("bad", "very good"), {"bad", "very good"}), ("regression", (1.5, -2), {"1.5", "-2"})],
)
def test_a_classified_document_has_its_label_in_the_heading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: str, labels: tuple[Any, Any], expected: set[str]
) -> None:
    rows = [{"text": f"hello {index}", "label": labels[index % 2]} for index in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = make_model_folder(tmp_path / "bert", "bert")
    settings = {
        "task": "sequence_classification",
        "classification": {"problem": problem},
        "model": {"name_or_path": str(folder)},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 64},
        "train": {"max_steps": 1},
        "run_dir": str(tmp_path / "run"),
    }
    text = shown(RunConfig.model_validate(settings), 1, capsys)
    found = re.findall(r"^-- document \d of 6: tokens \d+, label (.*)\n(.*)$", text, re.M)
    assert len(found) == 6 and {label for label, _ in found} == expected
    for label, document in found:
        index = int(re.findall(r"hello (\d)", document)[0])
        assert label == f"{labels[index % 2]}"
    assert OPEN not in text and "[CLS]" not in text.partition("lengths of documents")[2]


def test_the_statistics_of_all_data_sets_are_shown(
    tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, llama_folder, eval=str(tmp_path / "eval.jsonl"), on_bad_row="skip")
    (tmp_path / "eval.jsonl").write_text('{"prompt": "[red]what", "completion": "it does"}\nnot JSON\n')
    lines = shown(config, 1, capsys).partition("\ndata ")[2].splitlines()
    numbers = {re.split("  +", line)[0]: re.split("  +", line.rstrip())[1:] for line in lines}
    rows = load_data(config).rows
    train, evaluation = rows["data.train"].statistics, rows["data.eval"].statistics
    assert lines[1:3] == [f"data.train: {config.data.train}", f"data.eval: {config.data.eval}"]
    for name, field in {
        "rows": "rows",
        "documents": "documents",
        "tokens": "tokens",
        "label tokens": "label_tokens",
    }.items():
        assert numbers[name][:2] == [f"{train[field]:,}", f"{evaluation[field]:,}"]
    assert numbers["skipped rows of the source"] == ["0", "1"]
    assert numbers["share of label tokens"] == [f"{train['label_share']:.1%}", f"{evaluation['label_share']:.1%}"]
    density = [f"{train['packing_density']:.1%}", f"{evaluation['packing_density']:.1%}"]
    assert numbers["packing density: tokens / (rows * 64)"] == density
    longest = train["longest"][0]
    assert f"{longest['tokens']:>7}   {longest['label_tokens']:>12}   world world" in "\n".join(lines)
    (bin,) = evaluation["document_lengths"]
    assert any(
        line.split()[:5] == [str(bin["min_tokens"]), "to", str(bin["max_tokens"]), "1", "#" * 16] for line in lines
    )


def test_rows_and_passes_of_each_source_are_shown(
    tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "few.jsonl").write_text('{"prompt": "few", "completion": "it does"}\n')
    sources = [{"path": str(tmp_path / "rows.jsonl"), "weight": 1}, {"path": str(tmp_path / "few.jsonl"), "weight": 2}]
    config = make_config(tmp_path, llama_folder, train=sources)
    text = shown(config, 3, capsys)
    assert text.count("few") > 2, "two of the first three rows"
    lines = [re.split("  +", line.strip()) for line in text.partition("data.train: sources")[2].splitlines()]
    num_rows = len(load_data(config).rows["data.train"]) - 1
    assert lines[1] == ["source", "rows", "documents", "tokens", "weight", "passes"]
    assert [lines[2][1], *lines[2][4:]] == [str(num_rows), "1", f"{6 / num_rows:.3g}"]
    assert [lines[3][1], *lines[3][4:]] == ["1", "2", "12"]  # 9 steps of 2 rows, two thirds of them


def test_nothing_is_written_but_the_cache(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(config, 1, capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}


def test_problems_of_model_and_data_are_one_message(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "what"\n')
    wrong = config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": str(tmp_path / "no")})})
    with pytest.raises(UserError) as caught:
        show_batch(wrong, 1)
    assert [problem.partition(":")[0] for problem in caught.value.problems[:2]] == ["model.name_or_path", "data.train"]
    assert "rows.jsonl:1: not JSON" in caught.value.problems[1]


def printed(*spans: Span, colours: bool = False) -> str:
    output = io.StringIO()
    console = Console(file=output, width=20, force_terminal=colours, color_system="standard" if colours else None)
    console.print(as_text(spans), soft_wrap=True)
    return output.getvalue()


def test_text_is_printed_as_it_is() -> None:
    """No line is folded, no markup read, no white space removed."""
    text = f"[bold]{'long ' * 10} \n\n  "
    assert printed(Span(text, False), Span(text, True)) == f"{text}{OPEN}{text}{CLOSE}\n"


def test_characters_that_control_the_terminal_are_spelled_out() -> None:
    assert printed(Span("a\x1b[31m\r\x00\x9b", True)) == f"{OPEN}a\\x1b[31m\\r\\x00\\x9b{CLOSE}\n"


def test_labels_are_coloured_on_a_terminal() -> None:
    assert printed(Span("what", False), Span("it", True), colours=True) == f"what\x1b[30;42m{OPEN}it{CLOSE}\x1b[0m\n"
