"""Tokenized documents on disk: by how many processes, after whatever interruption, they are the same."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qvtune.config.schema import DataSection
from qvtune.data import chunk as chunk_module
from qvtune.data.chunk import chunks
from qvtune.data.dataset import TokenRows, build_token_rows
from qvtune.data.documents import DocumentWriter
from qvtune.data.formats import Record
from qvtune.data.rows import BadRowError, Row
from qvtune.data.tokenize import Document
from qvtune.errors import StopRequested, UserError
from qvtune.storage.lock import exclusive
from qvtune.tasks.causal_lm import TASK

PAIRS = [{"prompt": "hello", "completion": f" world {index}"} for index in range(50)]
WriteJsonl = Callable[..., Path]
Build = Callable[..., TokenRows]


class Counting:
    """The task, with every call written to a file, so that those in other processes count as well.

    ``at`` is called with the place of each row.
    """

    cache_key, truncates = TASK.cache_key, False

    def __init__(self, log: Path, at: Callable[[str], None] = lambda place: None) -> None:
        self.log, self.at = log, at
        log.touch()

    def tokenize(
        self, rows: Sequence[Row], tokenizer: Any, loss_on: Any, max_length: int
    ) -> list[list[Document] | BadRowError]:
        for row in rows:
            with self.log.open("a") as file:
                file.write(f"{row.place.rpartition(':')[2]} {os.getpid()}\n")
            self.at(row.place)
        return TASK.tokenize(rows, tokenizer, loss_on, max_length)

    def lines(self) -> list[int]:
        """Of the source, in ascending order."""
        return sorted(int(line.split()[0]) for line in self.log.read_text().splitlines())

    def processes(self) -> set[int]:
        return {int(line.split()[1]) for line in self.log.read_text().splitlines()}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 rows."""
    monkeypatch.setattr(chunk_module, "FIRST_CHUNK_ROWS", 4)
    monkeypatch.setattr(chunk_module, "ROWS_PER_CALL", 2)


@pytest.fixture
def build(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Build:
    def build_rows(
        path: Path, task: Any = TASK, cache: str = "cache", poll: Callable[[], None] = lambda: None, **settings: Any
    ) -> TokenRows:
        config = DataSection.model_validate({"train": str(path), "max_length": 16, "num_workers": 1, **settings})
        return build_token_rows(config.train_sources[0], config, tokenizer, task, tmp_path / cache, poll)

    return build_rows


def content(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def test_the_number_of_processes_changes_nothing(build: Build, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    path = write_jsonl(*PAIRS)
    build(path)
    for num_workers in (2, 3):
        task = Counting(tmp_path / f"log {num_workers}")
        build(path, task, f"cache {num_workers}", num_workers=num_workers)
        assert os.getpid() not in task.processes() and 1 <= len(task.processes()) <= num_workers
        assert content(tmp_path / f"cache {num_workers}") == content(tmp_path / "cache")
    assert len(content(tmp_path / "cache")) == 13 + 3  # files of documents; their summary, rows and statistics


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stop_request_keeps_what_is_finished(
    num_workers: int, build: Build, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    path = write_jsonl(*PAIRS)
    task = Counting(tmp_path / "log", lambda place: time.sleep(0.02))

    def stop() -> None:
        if len(list((tmp_path / "cache").glob(".*.partial/documents*"))) >= 2:
            raise StopRequested("stopped on request")

    with pytest.raises(StopRequested):
        build(path, task, poll=stop, num_workers=num_workers)
    (partial,) = (tmp_path / "cache").iterdir()
    assert partial.name.endswith(".partial") and all(file.name.startswith("documents-") for file in partial.iterdir())
    finished = {int(file.stem.removeprefix("documents-")) for file in partial.iterdir()}
    assert 2 <= len(finished) < 13

    rest = Counting(tmp_path / "rest")
    build(path, rest, num_workers=num_workers)
    assert rest.lines() == [line for line in range(1, 51) if (line - 1) // 4 not in finished]
    build(path, cache="in one go")
    assert content(tmp_path / "cache") == content(tmp_path / "in one go")


def test_after_kill_9_nothing_that_is_half_made_counts(
    build: Build, write_jsonl: WriteJsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(*PAIRS)
    task = Counting(tmp_path / "log")

    def slow_writing(writer: DocumentWriter, private: Path, *arguments: Any) -> None:
        private.write_bytes(b"half")
        if len(task.lines()) > 20:
            signal.pause()
        write(writer, private, *arguments)

    write = DocumentWriter.write
    monkeypatch.setattr(DocumentWriter, "write", slow_writing)
    if (pid := os.fork()) == 0:
        with suppress(BaseException):
            build(path, task, num_workers=2)
        os._exit(0)
    monkeypatch.undo()
    monkeypatch.setattr(chunk_module, "FIRST_CHUNK_ROWS", 4)
    wait_until(lambda: len(task.lines()) > 20)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until(lambda: not any(map(is_running, task.processes())))  # they end with the process that started them
    names = {file.name for file in (tmp_path / "cache").glob(".*.partial/*")}
    assert any(name.startswith(".documents") for name in names), "half-written files are left"

    build(path)
    build(path, cache="in one go")
    assert content(tmp_path / "cache") == content(tmp_path / "in one go")


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_is_killed_is_said_and_what_is_finished_stays(
    build: Build, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    def out_of_memory(place: str) -> None:
        if place.endswith(":30"):
            os.kill(os.getpid(), signal.SIGKILL)

    path = write_jsonl(*PAIRS)
    with pytest.raises(RuntimeError, match=r"was killed, most likely because the memory was full: data\.num_workers"):
        build(path, Counting(tmp_path / "log", out_of_memory), num_workers=2)
    assert len(list((tmp_path / "cache").glob(".*.partial/documents*"))) >= 5
    build(path, num_workers=2)
    build(path, cache="in one go")
    assert content(tmp_path / "cache") == content(tmp_path / "in one go")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_all_bad_rows_are_in_one_message_and_nothing_is_left(
    num_workers: int, build: Build, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    bad = {5: "x", 6: "y", 23: {"prompt": "a"}, 49: "z"}
    path = write_jsonl(*(bad.get(index, pair) for index, pair in enumerate(PAIRS)))
    task = Counting(tmp_path / "log", lambda place: time.sleep(0.02))
    with pytest.raises(UserError) as caught:
        build(path, task, num_workers=num_workers)
    *problems, advice = caught.value.problems
    assert [problem.partition(": ")[0] for problem in problems] == [f"{path}:{index + 1}" for index in bad]
    assert advice.startswith("46 rows are good")
    assert list((tmp_path / "cache").iterdir()) == []
    assert max(task.lines()) < 49, "once a row is bad the others are only read"
    found = build(path, on_bad_row="skip", num_workers=num_workers).statistics
    assert (found["source_rows"], found["skipped"], sum(found["skipped_by_reason"].values())) == (46, 4, 4)


def test_what_a_process_finds_wrong_with_the_tokenizer_arrives_as_it_is(
    build: Build, write_jsonl: WriteJsonl, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.chat_template = None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_jsonl(*[{"messages": turns}] * 20)
    messages = []
    for num_workers in (1, 2):
        with pytest.raises(UserError, match="no chat template") as caught:
            build(path, num_workers=num_workers)
        messages.append(caught.value.problems)
    assert messages[0] == messages[1]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_one_message_and_the_next_start_goes_on(
    build: Build, write_jsonl: WriteJsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    path = write_jsonl(*PAIRS)
    with monkeypatch.context() as patch:
        patch.setattr(DocumentWriter, "write", full)
        with pytest.raises(UserError, match=r"No space left on device in .*cache; make room there and start again"):
            build(path)
    assert [file.name for file in (tmp_path / "cache").glob(".*.partial/*")] == []
    build(path)


def test_of_two_that_want_the_same_documents_one_makes_them(
    build: Build, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    """The second waits for the lock, and finds the documents when it gets it."""
    path = write_jsonl(*PAIRS)
    build(path)
    (folder,) = (tmp_path / "cache").iterdir()
    hidden = folder.rename(tmp_path / "hidden")
    lock = exclusive(folder.with_name(f".{folder.name}.lock"), lambda: pytest.fail("nobody holds it"))
    lock.__enter__()
    waited = 0

    def made_by_another() -> None:
        nonlocal waited
        waited += 1
        if waited == 2:
            hidden.rename(folder)
            lock.__exit__(None, None, None)

    task = Counting(tmp_path / "log")
    assert len(build(path, task, poll=made_by_another)) > 0
    assert waited == 2 and task.lines() == []


def records(*sizes: int) -> Iterator[Record]:
    return (Record(f"rows.jsonl:{line}", b"x" * size) for line, size in enumerate(sizes, start=1))


def test_chunks_grow_with_the_source_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_module, "CHUNKS_OF_A_SIZE", 2)
    monkeypatch.setattr(chunk_module, "MAX_CHUNK_ROWS", 10)
    found = list(chunks(records(*[1] * 60)))
    assert [len(chunk.records) for chunk in found] == [4, 4, 8, 8, 10, 10, 10, 6]
    assert [chunk.number for chunk in found] == list(range(8))
    assert [record for chunk in found for record in chunk.records] == list(records(*[1] * 60))
    monkeypatch.setattr(chunk_module, "MAX_CHUNK_BYTES", 100)
    assert [len(chunk.records) for chunk in chunks(records(50, 60, 200, 1, 1, 1, 1, 1))] == [2, 1, 5]


def test_an_empty_source_has_no_chunks() -> None:
    assert list(chunks([])) == []
