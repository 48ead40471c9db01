"""What a base is: the same for any number of ranks, another for any other base."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvtune.config.schema import ModelSection
from qvtune.errors import UserError
from qvtune.model.fingerprint import Fingerprint, require_same, require_unchanged
from qvtune.model.loader import fill, open_base
from qvtune.model.shard import Whole
from qvtune.storage.checksum import partial_checksum
from qvtune.storage.safetensors import open_weights

NAME = "model.layers.1.mlp.down_proj.weight"


def fingerprint_of(folder: Path, section: ModelSection | None = None) -> Fingerprint:
    base = open_base(folder, section or ModelSection(), torch.float32, "sdpa")
    return fill(base, Whole(torch.device("cpu")), torch.float32, gather=lambda own: [own])[1]


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
