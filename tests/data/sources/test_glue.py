"""GLUE by name, in the official files, on the hub (a stand-in) and in files of other kinds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest

from qvtune.config.data import DataSection
from qvtune.config.glue import GLUE
from qvtune.data.rows import BadRows
from qvtune.data.sources.source import Source, open_source, read_rows
from qvtune.errors import UserError

BOM = "\ufeff"
LABELS = ("index", "Quality", "label", "score", "is_duplicate", "gold_label")


class Sample(NamedTuple):
    """A task's official file, a row of which has quotes that are never closed; the same rows on the hub; as read."""

    header: str
    lines: tuple[str, ...]
    hub: tuple[dict[str, Any], ...]
    labels: tuple[str, ...]


SAMPLES = {
    "cola": Sample(
        "",
        ('gj04\t1\t\tHe said "Go.', "bc01\t0\t*\tThey drank the pub."),
        ({"sentence": 'He said "Go.', "label": 1, "idx": 0}, {"sentence": "They drank the pub.", "label": 0, "idx": 1}),
        ("acceptable", "unacceptable"),
    ),
    "sst2": Sample(
        "sentence\tlabel",
        ('a "fine film \t1', "dull \t0"),
        ({"sentence": 'a "fine film ', "label": 1, "idx": 0}, {"sentence": "dull ", "label": 0, "idx": 1}),
        ("positive", "negative"),
    ),
    "mrpc": Sample(
        BOM + "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ('1\t7\t8\t"It rained.\tRain fell.', '0\t9\t10\tA ""word"".\t"A ""word"" more."'),
        (
            {"sentence1": '"It rained.', "sentence2": "Rain fell.", "label": 1, "idx": 0},
            {"sentence1": 'A ""word"".', "sentence2": '"A ""word"" more."', "label": 0, "idx": 1},
        ),
        ("equivalent", "not_equivalent"),
    ),
    "stsb": Sample(
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ('0\tnews\tf\t2012\t1\tnone\tnone\tA "plane.\tA plane.\t4.750',),
        ({"sentence1": 'A "plane.', "sentence2": "A plane.", "label": 4.75, "idx": 0},),
        ("4.75",),
    ),
    "qqp": Sample(
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ('0\t1\t2\tWhat is "up?\tHow?\t1',),
        ({"question1": 'What is "up?', "question2": "How?", "label": 1, "idx": 0},),
        ("duplicate",),
    ),
    "mnli": Sample(
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
        "\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        ('0\t3\t3n\tfiction\t( a )\t( b )\t(R a)\t(R b)\tHe left "it.\tHe went.\tneutral\tentailment',),
        ({"premise": 'He left "it.', "hypothesis": "He went.", "label": 0, "idx": 0},),
        ("entailment",),
    ),
    "qnli": Sample(
        "index\tquestion\tsentence\tlabel",
        ('0\tWho "is?\tNobody.\tnot_entailment',),
        ({"question": 'Who "is?', "sentence": "Nobody.", "label": 1, "idx": 0},),
        ("not_entailment",),
    ),
    "rte": Sample(
        "index\tsentence1\tsentence2\tlabel",
        ('0\tIt "rained.\tIt was wet.\tentailment',),
        ({"sentence1": 'It "rained.', "sentence2": "It was wet.", "label": 0, "idx": 0},),
        ("entailment",),
    ),
}
WriteFolder = Callable[[str], Path]


def columns_of_test_file(name: str) -> list[str]:
    """Of the official test file: one more in front, and no label; CoLA's has a header, too."""
    if name == "cola":
        return ["index", "sentence"]
    return ["index", *(one for one in SAMPLES[name].header.strip(BOM).split("\t") if one not in LABELS)]


@pytest.fixture
def folder(tmp_path: Path) -> WriteFolder:
    """A task's folder as GLUE publishes it, with files beside those of the splits."""

    def write(name: str) -> Path:
        sample, place = SAMPLES[name], tmp_path / "GLUE" / name.upper()
        (place / "original").mkdir(parents=True)
        (place / "original" / "raw.tsv").write_text("other\tcolumns\n")
        (place / "msr_paraphrase_train.txt").write_text("text")
        halves = ("dev_matched", "dev_mismatched") if name == "mnli" else ("dev",)
        for file, lines in {"train": sample.lines, **dict.fromkeys(halves, sample.lines[:1])}.items():
            text = "".join(line + "\r\n" for line in (sample.header, *lines) if line)
            (place / f"{file}.tsv").write_text(text, encoding="utf-8", newline="")
        (place / "test.tsv").write_text(
            "\t".join(columns_of_test_file(name)) + "\n" + "\t".join(columns_of_test_file(name)) + "\n"
        )
        return place

    return write


def rows_of(source: Any, use: str = "train") -> list[tuple[str, str | None, str]]:
    """Text, pair and label of what ``data.train`` or ``data.eval`` says."""
    section = DataSection.model_validate({use: source})
    sources = section.train_sources if use == "train" else next(iter(section.eval_sets.values()))
    found = []
    for one in sources:
        bad = BadRows(one.path, "error")
        rows: list[Any] = list(read_rows(open_source(one), bad))
        bad.check(len(rows))
        found += [(row.text, row.text_pair, row.label) for row in rows]
    return found


def expected(name: str) -> list[tuple[str, str | None, str]]:
    sample, task = SAMPLES[name], GLUE[name]
    texts = [[row[column] for column in task.texts] for row in sample.hub]
    return [(one[0], one[1] if len(one) > 1 else None, label) for one, label in zip(texts, sample.labels, strict=True)]


def scores_as_numbers(rows: list[tuple[str, str | None, str]]) -> list[tuple[str, str | None, str | float]]:
    return [(text, pair, float(label) if label[0].isdigit() else label) for text, pair, label in rows]


def test_all_tasks_are_there() -> None:
    assert len(GLUE) == 8 and SAMPLES.keys() == GLUE.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_the_official_folder(folder: WriteFolder, name: str) -> None:
    """Train and dev, with quotes as they are, whatever else is in the folder."""
    place = folder(name)
    source = {"path": str(place), "glue": name}
    wanted = scores_as_numbers(expected(name))
    assert scores_as_numbers(rows_of(source)) == wanted
    assert scores_as_numbers(rows_of(source, "eval")) == wanted[:1]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = []

    def load(path: str, config: str, *, split: str, **_: Any) -> Any:
        asked.append((path, config, split))
        return datasets.Dataset.from_list(list(SAMPLES[name].hub))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows_of(f"glue/{name}") == rows_of(f"glue/{name}", "eval") == expected(name)
    validation = "validation_matched" if name == "mnli" else "validation"
    assert list(dict.fromkeys(asked)) == [("nyu-mll/glue", name, "train"), ("nyu-mll/glue", name, validation)]


@pytest.mark.parametrize("name", SAMPLES)
def test_another_kind_of_file(tmp_path: Path, name: str) -> None:
    """The hub's rows, and the same under this project's names, as JSONL."""
    renamed = [
        {"text": text, "text_pair": pair, "label": row["label"]}
        for (text, pair, _), row in zip(expected(name), SAMPLES[name].hub, strict=True)
    ]
    for rows in (SAMPLES[name].hub, renamed):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert rows_of({"path": str(path), "glue": name}) == expected(name)


@pytest.mark.parametrize("name", ["mrpc", "stsb", "qqp", "mnli"])
def test_official_files_are_recognised_by_their_columns(folder: WriteFolder, name: str) -> None:
    path = str(folder(name) / "train.tsv")
    assert scores_as_numbers(rows_of(path)) == scores_as_numbers(expected(name))
    assert opened(path).settings.glue == name


def test_named_columns_are_taken_as_they_are(folder: WriteFolder) -> None:
    """No task is guessed for them; with a task that is named the labels have its names."""
    source = {"path": str(folder("qqp") / "train.tsv"), "columns": {"text": "question2", "label": "is_duplicate"}}
    assert opened(source).settings.glue is None
    assert rows_of(source) == [("How?", None, "1")]
    numbered = {"path": str(folder("cola") / "train.tsv"), "glue": "sst2", "columns": {"text": 4, "label": 2}}
    assert [row[2] for row in rows_of(numbered)] == ["positive", "negative"]


def opened(source: Any) -> Source:
    return open_source(DataSection.model_validate({"train": source}).train_sources[0])


def test_mnli_is_evaluated_on_two_sets(folder: WriteFolder) -> None:
    sets = DataSection.model_validate({"eval": {"path": str(folder("mnli")), "glue": "mnli"}}).eval_sets
    files = {name: [open_source(source).files[0].name for source in sources] for name, sources in sets.items()}
    assert files == {"matched": ["dev_matched.tsv"], "mismatched": ["dev_mismatched.tsv"]}
    named = DataSection.model_validate({"eval": {"nli": ["glue/mnli", "glue/rte"], "sst2": "glue/sst2"}}).eval_sets
    splits = {name: [source.split for source in sources] for name, sources in named.items()}
    assert splits == {
        "nli.matched": ["validation_matched", "validation"],
        "nli.mismatched": ["validation_mismatched", "validation"],
        "sst2": ["validation"],
    }
    one = DataSection.model_validate({"eval": {"path": "glue/mnli", "split": "validation_mismatched"}}).eval_sets
    assert list(one) == ["eval"]


@pytest.mark.parametrize("name", SAMPLES)
def test_test_rows_are_refused(folder: WriteFolder, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    place = folder(name)
    for source in ({"path": str(place), "glue": name, "split": "test"}, {"path": f"glue/{name}", "split": "test"}):
        with pytest.raises(UserError, match="does not publish the labels of its test rows, which `split: test` asks"):
            opened(source)
    with pytest.raises(UserError, match=f"it has no label, as in the test files of GLUE's {name}"):
        rows_of({"path": str(place / "test.tsv"), "glue": name})
    unlabelled = [{**row, "label": -1} for row in SAMPLES[name].hub]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(unlabelled))
    with pytest.raises(UserError, match="it has no label: GLUE does not publish those of its test rows"):
        rows_of({"path": "owner/glue", "glue": name, "split": "test"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("glue/sst-2", "glue/sst-2: no task of GLUE; there are cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte"),
        ("glue/wnli", "glue/wnli: no task of GLUE; there are cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte"),
        ({"path": "glue/sst2", "name": "cola"}, "glue/sst2 says which task of GLUE it is; leave `glue` and `name` out"),
        ({"path": "glue/sst2", "glue": "cola"}, "glue/sst2 says which task of GLUE it is; leave `glue` and `name` out"),
    ],
)
def test_what_is_no_task(source: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(source)


def test_rows_that_are_not_those_of_the_task(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"sentence": "fine", "label": 2}\n{"sentence": "fine", "label": 1}\n{"text": "x"}\n')
    with pytest.raises(UserError) as caught:
        rows_of({"path": str(path), "glue": "sst2"})
    first, second, _ = caught.value.problems
    assert first == f"{path}:1: the label 2 is none of GLUE's sst2: 0 = negative, 1 = positive."
    assert second == f"{path}:3: it has no label, as in the test files of GLUE's sst2: give those for training and " + (
        "evaluation."
    )
    path.write_text('{"premise": "fine", "label": 0}\n')
    with pytest.raises(UserError, match=r"the columns are \['label', 'premise'\], but GLUE's rte has `sentence1` and"):
        rows_of({"path": str(path), "glue": "rte"})


def test_a_local_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("glue/sst2").mkdir(parents=True)
    Path("glue/sst2/dev.tsv").write_text("sentence\tlabel\nfine\t1\n")
    assert rows_of("glue/sst2", "eval") == [("fine", None, "positive")]


def test_without_the_hub_the_cache_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^nyu-mll/glue is no file or folder here.*not in the cache .*: load it once"):
        rows_of("glue/sst2")


def test_the_identity_has_the_task(tmp_path: Path) -> None:
    """The same file has other labels with it."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine", "label": 1}\n')
    plain, named = ({"path": str(path), **more} for more in ({}, {"glue": "sst2"}))
    assert opened(plain).identity() | {"glue": "sst2"} == opened(named).identity()
    assert "glue" not in opened(plain).identity()
