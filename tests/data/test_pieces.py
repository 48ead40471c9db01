"""Long documents are cut, divided or left out; against a definition that looks at one token after another."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qvtune.data import IGNORE_INDEX
from qvtune.data.documents import Documents, DocumentWriter, file_name, write_summary
from qvtune.data.pieces import OnLongRow, join, pieces, windows
from qvtune.data.tokenize import Document

MAX_LENGTH = 8
X = IGNORE_INDEX


def store(folder: Path, documents: list[tuple[Document, bool]], sizes: list[int]) -> Documents:
    """``sizes``: how many of the documents are in each file."""
    for number, size in enumerate(sizes):
        first = sum(sizes[:number])
        writer = DocumentWriter()
        for document in documents[first : first + size]:
            writer.add([document])
        writer.write(folder / file_name(number), {})
    write_summary(folder, sizes, {})
    return Documents(folder)


def some_documents(seed: int) -> list[tuple[Document, bool]]:
    draw = random.Random(seed)
    found = []
    for _ in range(40):
        ids = [draw.randrange(100) for _ in range(draw.choice((1, 5, 8, 9, 16, 17, 30)))]
        num_unlabelled = draw.randint(1, len(ids))
        found.append((Document(ids, [X] * num_unlabelled + ids[num_unlabelled:]), draw.random() < 0.3))
    return found


def expected(documents: list[tuple[Document, bool]], on_long_row: OnLongRow) -> list[tuple[int, int, list[int]]]:
    """Document, start and labels of each piece."""
    found = []
    for index, (document, is_text) in enumerate(documents):
        starts = [0]
        if len(document.ids) > MAX_LENGTH:
            how = "split" if is_text else on_long_row
            starts = {"cut": [0], "drop": [], "split": list(range(0, len(document.ids), MAX_LENGTH))}[how]
        for start in starts:
            labels = [X, *document.labels[start : start + MAX_LENGTH][1:]]
            if set(labels) != {X}:
                found.append((index, start, labels))
    return found


@pytest.mark.parametrize("on_long_row", ["cut", "split", "drop"])
@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_those_of_the_definition(tmp_path: Path, on_long_row: OnLongRow, seed: int) -> None:
    documents = some_documents(seed)
    counts: Counter[str] = Counter()
    found = join(pieces(store(tmp_path, documents, [7, 0, 20, 13]), MAX_LENGTH, on_long_row, counts))
    wanted = expected(documents, on_long_row)
    assert list(zip(found.documents.tolist(), found.starts.tolist(), strict=True)) == [one[:2] for one in wanted]
    assert found.lengths.tolist() == [len(labels) for _, _, labels in wanted]
    assert found.num_label_tokens.tolist() == [len(labels) - labels.count(X) for _, _, labels in wanted]
    long = {index for index, (document, _) in enumerate(documents) if len(document.ids) > MAX_LENGTH}
    kept = {index for index, _, _ in wanted}
    texts = {index for index, (_, is_text) in enumerate(documents) if is_text}
    assert counts["truncated"] == (len((long - texts) & kept) if on_long_row == "cut" else 0)
    assert counts["long_split"] == len((long if on_long_row == "split" else long & texts) & kept)
    assert counts["long_dropped"] == (len(long - texts) if on_long_row == "drop" else 0)


def test_pieces_without_a_label_are_counted(tmp_path: Path) -> None:
    prompt_of_two_pieces = Document([1] * 17, [X] * 16 + [1])
    one_label_at_a_start = Document([1] * 9, [X] * 8 + [1])
    counts: Counter[str] = Counter()
    documents = store(tmp_path, [(prompt_of_two_pieces, False), (one_label_at_a_start, False)], [2])
    found = join(pieces(documents, MAX_LENGTH, "split", counts))
    assert len(found) == 0, "the first token of a piece has nothing to be predicted from"
    assert (counts["dropped"], counts["long_split"]) == (5, 0)


def test_a_label_at_the_first_token_stays_and_so_do_types(tmp_path: Path) -> None:
    """As classification has it; what the task has truncated itself is counted."""
    labelled = Document([5, 6, 7], [1, X, X], truncated=True, token_type_ids=[0, 0, 1])
    counts: Counter[str] = Counter()
    documents = store(tmp_path, [(labelled, False)], [1])
    found = join(pieces(documents, MAX_LENGTH, "cut", counts))
    assert (found.num_label_tokens.tolist(), counts["truncated"], counts["dropped"]) == ([1], 1, 0)
    assert [values.tolist() for values in documents.gather([0], [1], [2])] == [[6, 7], [X, X], [0, 1]]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_windows_are_the_same_pieces(tmp_path: Path, size: int) -> None:
    documents = store(tmp_path, some_documents(1), [5, 0, 35])
    whole = join(pieces(documents, MAX_LENGTH, "cut", Counter()))
    found = list(windows(pieces(documents, MAX_LENGTH, "cut", Counter()), size))
    assert [len(one) for one in found[:-1]] == [size] * (len(found) - 1) and 0 < len(found[-1]) <= size
    for name, values in vars(whole).items():
        assert np.array_equal(np.concatenate([getattr(one, name) for one in found]), values)


def test_parts_of_documents_are_read_from_any_file(tmp_path: Path) -> None:
    documents = some_documents(2)
    stored = store(tmp_path, documents, [7, 0, 20, 13])
    assert len(stored) == 40
    wanted = [(39, 0, 1), (0, 0, 1), (6, 0, 1), (7, 0, 1), (26, 0, 1), (27, 0, 1)]
    ids, labels, types = stored.gather(*map(list, zip(*wanted, strict=True)))
    assert ids.tolist() == [documents[index][0].ids[0] for index, _, _ in wanted]
    assert labels.tolist() == [documents[index][0].labels[0] for index, _, _ in wanted]
    assert len(types) == 0, "these documents have none"
    for index, (document, _) in enumerate(documents):
        assert stored.labels(index).tolist() == document.labels
