import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qvtune.base.writer import TensorPlan, write_model

TENSORS = {
    "odd.weight": torch.randn(3, 1).bfloat16(),
    "wide.weight": torch.randn(5, 7),
    "bias": torch.randn(3).half(),
    "scalar": torch.tensor(2.5),
    "norm": torch.randn(4),
}
PLANS = [TensorPlan(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    assert write_model(tmp_path, PLANS, TENSORS.__getitem__, 10**6) == ["model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor)


def test_every_tensor_begins_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    write_model(tmp_path, PLANS, TENSORS.__getitem__, 10**6)
    content = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert size % 8 == 0
    for name, entry in header.items():
        assert entry["data_offsets"][0] % TENSORS[name].element_size() == 0, name


def test_shards_stay_below_their_size_and_a_larger_tensor_stands_alone(tmp_path: Path) -> None:
    names = write_model(tmp_path, PLANS, TENSORS.__getitem__, 20)
    assert names == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert [list(load_file(tmp_path / name)) for name in names] == [
        ["odd.weight"],
        ["wide.weight"],  # 140 bytes
        ["scalar", "bias"],
        ["norm"],
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["bias"] == names[2]
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values())}


def test_a_tensor_that_is_not_as_planned_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="norm"):
        write_model(tmp_path, PLANS, (TENSORS | {"norm": torch.ones(5)}).__getitem__, 10**6)
