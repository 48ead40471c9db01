"""Data sets of the hub, which no test can reach: a folder stands in for it behind ``datasets.load_dataset``."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from datasets.exceptions import DatasetNotFoundError

from qvtune.config.data import SourceSection
from qvtune.data.formats import Record
from qvtune.data.sources.source import Source, open_source
from qvtune.errors import UserError

PAIRS = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in range(5)]


def hub_source(**settings: Any) -> Source:
    return open_source(SourceSection.model_validate({"path": "owner/sums", "format": "auto", **settings}))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """``owner/sums`` with two splits; returns what ``load_dataset`` was asked for."""
    for split, rows in {"train": PAIRS, "test": PAIRS[:2]}.items():
        (tmp_path / "sums").mkdir(exist_ok=True)
        (tmp_path / f"sums/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls: list[dict[str, Any]] = []

    def stand_in(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_folder(path: str, name: str | None = None, *, revision: str | None = None, **options: Any) -> Any:
            calls.append({"path": path, "name": name, "revision": revision, **options})
            return load(str(tmp_path / "sums"), name, cache_dir=str(tmp_path / "cache"), **options)

        return load_folder

    monkeypatch.setattr(datasets, "load_dataset", stand_in(datasets.load_dataset))
    monkeypatch.setattr(datasets, "load_dataset_builder", stand_in(datasets.load_dataset_builder))
    return calls


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_at_a_revision(asked: list[dict[str, Any]], streaming: bool) -> None:
    source = hub_source(split="train", revision="abc", streaming=streaming, max_rows=4)
    records = list(source.records())
    assert [record.value for record in records] == PAIRS[:4]
    assert [record.place for record in records[:2]] == ["owner/sums (train) row 1", "owner/sums (train) row 2"]
    assert source.parser().format == "prompt_completion"
    assert asked[0] == {
        "path": "owner/sums",
        "name": None,
        "revision": "abc",
        "split": "train",
        "streaming": streaming,
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_the_identity_follows_the_content(asked: list[dict[str, Any]], streaming: bool, tmp_path: Path) -> None:
    def identity(split: str) -> str:
        return json.dumps(hub_source(split=split, streaming=streaming).identity(), sort_keys=True)

    before = [identity("train"), identity("test")]
    assert [identity("train"), identity("test")] == before and before[0] != before[1]
    with (tmp_path / "sums/train.jsonl").open("a") as file:
        file.write(json.dumps(PAIRS[0]) + "\n")
    assert identity("train") not in before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"^owner/sums has several splits: there are train, test; set `split` to one of them$"),
        ({"streaming": True}, r"^owner/sums has several splits: there are train, test; set `split` to one of them$"),
        ({"split": "dev"}, r"^owner/sums is no file or folder here, and as a hub data set .*: .*dev.*train.*test"),
    ],
)
def test_splits_that_are_not_there(asked: list[dict[str, Any]], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(hub_source(**settings).records())
    assert asked


def test_without_the_hub_the_cache_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE, as on compute nodes; the libraries read it when they are imported."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        list(hub_source(split="train").records())
    (problem,) = caught.value.problems
    assert problem.startswith("owner/sums is no file or folder here, and as a hub data set it cannot be loaded: ")
    assert str(datasets.config.HF_DATASETS_CACHE) in problem and "HF_HUB_OFFLINE is set" in problem
    assert "load it once where the hub can be reached" in problem


def test_a_data_set_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise DatasetNotFoundError("Dataset 'owner/sums' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        UserError, match=r"cannot be loaded: Dataset 'owner/sums' doesn't exist on the Hub or cannot be"
    ):
        list(hub_source(split="train").records())


def test_a_stream_that_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield PAIRS[0]
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", stream)
    records = hub_source(split="train", streaming=True).records()
    assert next(records).value == PAIRS[0]
    with pytest.raises(
        UserError, match=r"^owner/sums \(train\) cannot be read after row 1 \(no route to host\); try again"
    ):
        next(records)


@pytest.mark.parametrize("path", ["rows/train.jsonl", "owner/name/more", "name", "rows/train.parquet"])
def test_what_is_no_hub_id_is_a_file_that_is_not_there(path: str) -> None:
    with pytest.raises(UserError, match=f"^cannot read {path}: No such file or directory. Give a file, a folder"):
        open_source(SourceSection(path=path))


def test_an_address_is_no_source() -> None:
    with pytest.raises(
        UserError, match=r"^hf://datasets/a/b is an address on a network; download the files, or give a hub"
    ):
        open_source(SourceSection(path="hf://datasets/a/b"))


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/sums").mkdir(parents=True)
    Path("owner/sums/rows.jsonl").write_text(json.dumps(PAIRS[0]))
    assert list(hub_source().records()) == [Record("owner/sums/rows.jsonl:1", json.dumps(PAIRS[0]).encode())]
