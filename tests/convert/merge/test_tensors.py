"""Merged tensors in blocks of rows: several of them with a shorter last one, against the whole tensor at once."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvtune.convert.merge.base import MergeBase
from qvtune.convert.merge.changes import (
    Adapter,
    Change,
    Composed,
    LazyReplacement,
    LowRank,
    Replaced,
    RowsReplaced,
    Scaled,
)
from qvtune.convert.merge.tensors import Merger
from qvtune.convert.proof.views import ModelView, adapted_base, as_merged
from qvtune.model.fingerprint import ContentChecksums
from qvtune.storage.safetensors import open_weights, read_headers

ROWS, COLUMNS = 10, 12
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def low_rank(*, transposed: bool = False, dora: bool = False) -> LowRank:
    num_in, num_out = (ROWS, COLUMNS) if transposed else (COLUMNS, ROWS)
    return LowRank(random(3, num_in), random(num_out, 3), 1.5, transposed, random(num_out).abs() if dora else None)


def lazily(folder: Path) -> LazyReplacement:
    save_file({"trained": random(ROWS, COLUMNS)}, folder / "trained.safetensors")
    return LazyReplacement(read_headers([folder / "trained.safetensors"])["trained"])


# Name -> the change of a matrix [ROWS, COLUMNS], and whether rows of its result depend on the same rows only.
CHANGES: dict[str, tuple[Callable[[Path], Change], bool]] = {
    "lora": (lambda _: low_rank(), True),
    "dora": (lambda _: low_rank(dora=True), True),
    "transposed": (lambda _: low_rank(transposed=True), True),
    "transposed dora": (lambda _: low_rank(transposed=True, dora=True), False),
    "scaled outputs": (lambda _: Scaled(random(ROWS, 1)), True),
    "scaled inputs": (lambda _: Scaled(random(1, COLUMNS)), True),
    "replaced": (lambda _: Replaced(random(ROWS, COLUMNS)), True),
    "lazy": (lazily, True),
    "tokens": (lambda _: RowsReplaced((0, 4, 9), random(3, COLUMNS)), True),
    "tokens, lora": (lambda _: Composed(RowsReplaced((2, 3), random(2, COLUMNS)), low_rank()), True),
    "transposed dora, tokens": (
        lambda _: Composed(low_rank(transposed=True, dora=True), RowsReplaced((7,), random(1, COLUMNS))),
        False,
    ),
    "tokens, transposed dora": (
        lambda _: Composed(RowsReplaced((7,), random(1, COLUMNS)), low_rank(transposed=True, dora=True)),
        False,
    ),
}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MergeBase:
    """A matrix that is computed three rows at a time, and a vector that is copied 7 elements at a time."""
    monkeypatch.setattr("qvtune.convert.merge.tensors.COMPUTED", 3 * COLUMNS + 5)
    monkeypatch.setattr("qvtune.convert.merge.tensors.COPIED", 7)
    save_file({"matrix": random(ROWS, COLUMNS), "vector": random(31)}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    return MergeBase(tmp_path, weights, weights.tensors, {}, None)


def sizes(merger: Merger, name: str) -> list[int]:
    return [piece.numel() for piece in merger.pieces(name)]


@pytest.mark.parametrize("name", CHANGES)
def test_blocks_of_rows_give_the_whole_tensor_and_its_norms(base: MergeBase, tmp_path: Path, name: str) -> None:
    make, by_rows = CHANGES[name]
    change = make(tmp_path)
    before = load_file(tmp_path / "model.safetensors")["matrix"]
    expected = change.apply(before)
    assert not torch.equal(expected, before)
    checksums = ContentChecksums(base.weights)
    merger = Merger(base, Adapter({"matrix": change}, torch.float32), torch.bfloat16, checksums)
    merged = list(merger.pieces("matrix"))
    assert [piece.numel() for piece in merged] == ([36, 36, 36, 12] if by_rows else [120])
    found = torch.cat(merged).view(ROWS, COLUMNS)
    torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-7, atol=1e-6)
    update, written = (expected - before).double(), expected.bfloat16().double()
    moved = written - before.bfloat16().double()
    norms = {
        "update_norm": update.norm(),
        "weight_norm": before.double().norm(),
        "ratio": update.norm() / before.double().norm(),
        "rounding_norm": (written - expected.double()).norm(),
        "kept": (moved * update).sum() / update.square().sum(),
    }
    for norm, value in norms.items():
        assert getattr(merger.updates["matrix"], norm) == pytest.approx(float(value), rel=0.02), norm
    whole = ContentChecksums(base.weights)
    whole.add("matrix", before.flatten())
    assert checksums.sums == whole.sums  # each element was read once


def test_what_nothing_changes_is_copied_bit_by_bit(base: MergeBase, tmp_path: Path) -> None:
    checksums = ContentChecksums(base.weights)
    merger = Merger(base, Adapter({}, torch.float32), torch.bfloat16, checksums)
    assert sizes(merger, "vector") == [7, 7, 7, 7, 3]
    assert sizes(merger, "matrix") == [7] * 17 + [1]
    stored = load_file(tmp_path / "model.safetensors")
    checksums.sums.clear()
    for name, tensor in stored.items():
        assert torch.equal(torch.cat(list(merger.pieces(name))), tensor.flatten())
    whole = ContentChecksums(base.weights)
    for name, tensor in stored.items():
        whole.add(name, tensor.flatten())
    assert checksums.sums == whole.sums


def test_a_row_wider_than_a_block_is_a_block(base: MergeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvtune.convert.merge.tensors.COMPUTED", COLUMNS - 1)
    merger = Merger(base, Adapter({"matrix": low_rank()}, torch.float32), torch.float32)
    assert sizes(merger, "matrix") == [COLUMNS] * ROWS


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(("first", "last"), [(0, 4), (3, 8), (8, None), (0, None)])
def test_rows_of_a_view_are_rows_of_the_whole(
    base: MergeBase, tmp_path: Path, name: str, first: int, last: int | None
) -> None:
    make, by_rows = CHANGES[name]
    change = make(tmp_path)
    before = load_file(tmp_path / "model.safetensors")["matrix"]
    expected = change.apply(before)
    adapter = Adapter({"matrix": change}, torch.float32)
    views: list[tuple[ModelView, Any]] = [
        (adapted_base(base, adapter), expected),
        (as_merged(base, adapter, torch.bfloat16), expected.bfloat16().float()),
    ]
    for view, whole in views:
        torch.testing.assert_close(view.rows("matrix", first, last), whole[first:last], rtol=2**-7, atol=1e-6)
    assert change.is_row_wise == by_rows
    if by_rows:
        end = ROWS if last is None else last
        rows = change.rows(first, end)
        torch.testing.assert_close(rows.apply(before[first:end]), expected[first:end])
        inner = rows.rows(1, end - first)
        torch.testing.assert_close(inner.apply(before[first + 1 : end]), expected[first + 1 : end])


def test_changes_of_rows_that_no_token_is_in_leave_them(base: MergeBase) -> None:
    change = RowsReplaced((0, 9), random(2, COLUMNS))
    weight = random(4, COLUMNS)
    assert torch.equal(change.rows(3, 7).apply(weight), weight)


def test_scaling_is_told_where_all_share_one() -> None:
    shared = {"a": low_rank(), "b": low_rank(), "c": Replaced(random(2))}
    assert Adapter(shared, torch.float32).scaling == 1.5
    other = LowRank(random(1, 2), random(2, 1), math.pi)
    assert Adapter(shared | {"d": other}, torch.float32).scaling is None
