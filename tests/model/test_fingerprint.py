"""What a base is: the same for any number of ranks, another for any other base."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvtune.config.schema import ModelSection
from qvtune.errors import UserError
from qvtune.model.fingerprint import MANIFEST, ContentChecksums, Fingerprint, require_same, require_unchanged
from qvtune.model.loader import fill, open_base
from qvtune.model.quantize import quantize
from qvtune.model.shard import Shard, Whole
from qvtune.storage.checksum import partial_checksum
from qvtune.storage.safetensors import open_weights
from tests.model.one_of_many import Alone

NAME = "model.layers.1.mlp.down_proj.weight"


def fingerprint_of(folder: Path, section: ModelSection | None = None) -> Fingerprint:
    base = open_base(folder, section or ModelSection(), torch.float32, "sdpa")
    return fill(base, Whole(torch.device("cpu")), torch.float32)[1]


def change(folder: Path, copy: Path, value: float) -> Path:
    """``folder`` with another value in the middle of one tensor."""
    copy.mkdir()
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME].view(-1)[1234] = value
    save_file(tensors, copy / "model.safetensors")
    return copy


def test_it_covers_name_shape_dtype_and_content_of_every_tensor(llama_folder: Path) -> None:
    found = fingerprint_of(llama_folder)
    tensors = load_file(llama_folder / "model.safetensors")
    assert found == {
        name: f"bfloat16{list(tensor.shape)} {partial_checksum(tensor.flatten(), 0):016x}"
        for name, tensor in tensors.items()
    }
    assert found == fingerprint_of(llama_folder, ModelSection(quantization="none"))


def test_one_other_value_is_named(tmp_path: Path, llama_folder: Path) -> None:
    other = fingerprint_of(change(llama_folder, tmp_path / "other", 0.125))
    with pytest.raises(UserError) as caught:
        require_same(fingerprint_of(llama_folder), other, "the base", "give the right one")
    [problem, advice] = caught.value.problems
    assert NAME in problem and advice == "give the right one"


def test_a_head_may_be_in_one_of_two_alone_only_where_heads_need_not_be_the_same(llama_folder: Path) -> None:
    whole = fingerprint_of(llama_folder)
    headless = {name: entry for name, entry in whole.items() if name != "lm_head.weight"}
    assert len(headless) < len(whole)
    for expected, found in ((whole, headless), (headless, whole)):
        require_same(expected, found, "the base", "give the right one", same_heads=False)
        with pytest.raises(UserError, match=r"lm_head\.weight"):
            require_same(expected, found, "the base", "give the right one")
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        require_same(whole, whole | {"lm_head.weight": "another"}, "the base", "give", same_heads=False)


def test_a_byte_that_flips_after_the_first_reading_is_refused_by_name(tmp_path: Path, llama_folder: Path) -> None:
    folder = change(llama_folder, tmp_path / "base", 0.125)
    file = folder / "model.safetensors"
    for _ in range(2):
        require_unchanged(open_weights(folder), fingerprint_of(folder), tmp_path / "bases")

    content = bytearray(file.read_bytes())
    content[open_weights(folder)[NAME].offset + 7] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"'{NAME}' is bfloat16") as caught:
        require_unchanged(open_weights(folder), fingerprint_of(folder), tmp_path / "bases")
    [record] = (tmp_path / "bases").iterdir()
    assert f"have changed since {folder} was read first; if they were meant to, delete {record}" in str(caught.value)

    another = file.with_name("another")
    another.write_bytes(content)
    another.replace(file)  # another file in its place: another base
    for _ in range(2):
        require_unchanged(open_weights(folder), fingerprint_of(folder), tmp_path / "bases")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, llama_folder: Path, value: float) -> None:
    with pytest.raises(UserError, match=f"{NAME}' holds NaN or infinite values"):
        fingerprint_of(change(llama_folder, tmp_path / "bad", value))


@dataclass(frozen=True, kw_only=True)
class InThread(Alone):
    """One of several ranks that run in threads, with a real collective among them."""

    contributed: dict[int, torch.Tensor]
    barrier: Barrier

    def all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        self.contributed[self.shard.rank] = own
        self.barrier.wait(timeout=60)
        parts = [self.contributed[shard.rank] for shard in self.shard.peers()]
        self.barrier.wait(timeout=60)
        return parts


def fingerprints_of_ranks(folder: Path, num_ranks: int) -> list[Fingerprint]:
    contributed: dict[int, torch.Tensor] = {}
    barrier = Barrier(num_ranks)
    bases = [open_base(folder, ModelSection(), torch.float32, "sdpa") for _ in range(num_ranks)]

    def load(shard: Shard) -> Fingerprint:
        placement = InThread(shard, contributed=contributed, barrier=barrier)
        return fill(bases[shard.rank], placement, torch.float32)[1]

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(load, Shard(0, num_ranks).peers()))


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_elements_that_two_ranks_read_count_once(llama_folder: Path, num_ranks: int) -> None:
    assert fingerprints_of_ranks(llama_folder, num_ranks) == [fingerprint_of(llama_folder)] * num_ranks


def test_a_base_stored_in_4_bits_too(tmp_path: Path, llama_folder: Path) -> None:
    """Its tables and descriptions are read by every rank, and counted once."""
    quantize(llama_folder, tmp_path / "nf4")
    (tmp_path / "nf4" / MANIFEST).unlink()  # else the fingerprint is that of the source
    assert fingerprints_of_ranks(tmp_path / "nf4", 3) == [fingerprint_of(tmp_path / "nf4")] * 3


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_value_that_is_not_finite_is_named_on_all_ranks(tmp_path: Path, llama_folder: Path, num_ranks: int) -> None:
    with pytest.raises(UserError, match=f"{NAME}' holds NaN or infinite values"):
        fingerprints_of_ranks(change(llama_folder, tmp_path / "bad", math.inf), num_ranks)


def test_reading_leaves_checksums_alone_and_adding_in_parts_gives_the_whole(llama_folder: Path) -> None:
    weights = open_weights(llama_folder)
    checksums = ContentChecksums(weights)
    whole = weights.read(NAME)
    assert checksums.sums == {}
    for start in range(0, len(whole), 1000):
        checksums.add(NAME, weights.read(NAME, start, min(start + 1000, len(whole))), start)
    in_bytes = ContentChecksums(weights)
    in_bytes.add(NAME, weights.read_bytes(NAME, 2001), 2001)
    in_bytes.add(NAME, weights.read_bytes(NAME, 0, 2001))
    assert checksums.sums == in_bytes.sums == {NAME: partial_checksum(whole, 0)}
    in_bytes.set_whole(NAME, whole)
    assert checksums.sums == in_bytes.sums
