import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qvtune.storage import writer
from qvtune.storage.writer import TensorPlan, checksum_of, plan_files, write_file, write_index

TENSORS = {
    "odd.weight": torch.randn(3, 1).bfloat16(),
    "wide.weight": torch.randn(5, 7),
    "bias": torch.randn(3).half(),
    "scalar": torch.tensor(2.5),
    "norm": torch.randn(4),
}
PLANS = [TensorPlan(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def pieces(name: str) -> Iterator[torch.Tensor]:
    yield from TENSORS[name].flatten().split(2)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_safetensors_reads_what_was_written(tmp_path: Path, num_threads: int) -> None:
    file = tmp_path / "model.safetensors"
    written = write_file(file, PLANS, pieces, num_threads)
    stored = load_file(file)
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor)
    assert written.num_bytes == file.stat().st_size
    assert checksum_of(file) == written
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_flipped_bit_is_another_checksum(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    written = write_file(file, PLANS, pieces)
    content = bytearray(file.read_bytes())
    for position in (0, len(content) // 2, len(content) - 1):
        content[position] ^= 1
        file.write_bytes(content)
        assert checksum_of(file) != written
        content[position] ^= 1


def test_every_tensor_begins_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", PLANS, pieces)
    content = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert size % 8 == 0
    for name, entry in header.items():
        assert entry["data_offsets"][0] % TENSORS[name].element_size() == 0, name


def test_shards_stay_below_their_size_and_a_larger_tensor_stands_alone(tmp_path: Path) -> None:
    whole = plan_files(PLANS, 10**6)
    assert list(whole) == ["model.safetensors"]
    write_index(tmp_path, whole)
    assert not list(tmp_path.iterdir()), "one file needs no index"
    files = plan_files(PLANS, 20)
    names = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert list(files) == names
    assert [[plan.name for plan in shard] for shard in files.values()] == [
        ["odd.weight"],
        ["wide.weight"],  # 140 bytes
        ["bias", "scalar"],
        ["norm"],
    ]
    write_index(tmp_path, files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["bias"] == names[2]
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values())}


@pytest.mark.parametrize("wrong", [torch.ones(5), torch.ones(4).half(), torch.ones(2, 2)])
def test_a_tensor_that_is_not_as_planned_is_not_written(tmp_path: Path, wrong: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="norm"):
        write_file(tmp_path / "model.safetensors", PLANS[-1:], lambda name: [wrong])
    assert not (tmp_path / "model.safetensors").exists()


def test_an_error_of_the_disk_that_only_the_flush_sees_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    def slowly(name: str) -> Iterator[torch.Tensor]:
        time.sleep(0.1)
        yield from pieces(name)

    monkeypatch.setattr(writer, "_FLUSH_SECONDS", 0.001)
    monkeypatch.setattr(writer.os, "fdatasync", failing)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "model.safetensors", PLANS[:1], slowly)
    assert not (tmp_path / "model.safetensors").exists()
