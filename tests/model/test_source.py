"""Ranges of stored tensors against safetensors' own reader, and everything that a model folder can lack."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qvtune.errors import UserError
from qvtune.model.source import cached_model_folder, model_folder
from qvtune.storage.safetensors import open_weights
from tests.support.tiny import make_hub_cache, make_model_folder

TENSORS = {
    "half": torch.randn(7, 9).half(),
    "brain": torch.randn(33, 65).bfloat16(),
    "single": torch.randn(5),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def write_header(folder: Path, header: bytes, data: bytes = b"") -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("half", 0, 63),
        ("half", 5, 31),
        ("brain", 64, 2145),
        ("brain", 2144, 2145),
        ("brain", 7, 7),
        ("single", 1, 4),
        ("empty", 0, 0),
    ],
)
def test_ranges_equal_safetensors(folder: Path, name: str, start: int, end: int) -> None:
    weights = open_weights(folder)
    actual = weights.read(name, start, end)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        expected = file.get_tensor(name).flatten()[start:end]
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
    assert weights.bytes_read == expected.nbytes, "no byte more is read"


def test_without_a_range_the_whole_tensor_is_read_and_counted(folder: Path) -> None:
    weights = open_weights(folder)
    assert weights.bytes_read == 0, "headers are not weights"
    assert weights.keys() == TENSORS.keys() and len(weights) == 4
    for name, tensor in TENSORS.items():
        assert torch.equal(weights.read(name), tensor.flatten())
        assert weights[name].shape == tuple(tensor.shape)
        assert weights[name].numel == tensor.numel()
    assert weights.bytes_read == sum(tensor.nbytes for tensor in TENSORS.values())


def test_an_indexed_folder_holds_all_tensors(tmp_path: Path) -> None:
    whole = open_weights(make_model_folder(tmp_path / "one", shards=1))
    sharded = open_weights(make_model_folder(tmp_path / "several", shards=3))
    assert len({tensor.file for tensor in sharded.values()}) >= 3
    assert sharded.keys() == whole.keys()
    for name in whole:
        assert torch.equal(sharded.read(name), whole.read(name))


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weights; expected model\.safetensors or model\.safetensors\.index\.json"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_only_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(UserError, match=rf"only pickle files \({name}\).*run code.*safetensors"):
        open_weights(tmp_path)


@pytest.mark.parametrize("cut", [1, 100])
def test_a_truncated_file(folder: Path, cut: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read .*truncated: tensor .* ends at byte"):
        open_weights(folder)


@pytest.mark.parametrize("kept", [0, 7, 8, 50])
def test_a_file_that_ends_in_its_header(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"its header claims \d+ bytes, the file has {kept}"):
        open_weights(folder)


def test_a_file_that_shrinks_after_it_was_opened(folder: Path) -> None:
    weights = open_weights(folder)
    last = max(weights.values(), key=lambda tensor: tensor.offset)
    last.file.write_bytes(last.file.read_bytes()[: last.offset + 1])
    with pytest.raises(UserError, match=f"ends inside tensor '{last.name}'"):
        weights.read(last.name)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}, "dtype I64; allowed: F32, F16, BF16"),
        ({"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}, "dtype F8_E4M3; allowed"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, r"8 bytes do not fit shape \[3\]"),
        ({"dtype": "F32", "data_offsets": [0, 8]}, "cannot be read as safetensors"),
        ("nonsense", "cannot be read as safetensors"),
    ],
)
def test_header_entries_that_cannot_be(tmp_path: Path, entry: object, message: str) -> None:
    write_header(tmp_path, json.dumps({"odd": entry}).encode(), bytes(8))
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)


@pytest.mark.parametrize("header", [b"{not json", b"\xff\xfe\xfd", b"[1, 2]"])
def test_a_header_that_is_not_an_object(tmp_path: Path, header: bytes) -> None:
    write_header(tmp_path, header)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        open_weights(tmp_path)


def test_all_unreadable_files_are_reported_at_once(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "gone.safetensors", "b": "short.safetensors", "c": "good.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "short.safetensors").write_bytes(b"short")
    save_file({"c": torch.zeros(3)}, tmp_path / "good.safetensors")
    with pytest.raises(UserError) as caught:
        open_weights(tmp_path)
    gone, short = caught.value.problems
    assert "gone.safetensors" in gone and "No such file" in gone
    assert "short.safetensors" in short


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": ["a"]}'])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        open_weights(tmp_path)


def test_a_model_folder_is_one_with_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(str(tmp_path), tmp_path / "cache") == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "is a folder without config.json"),
        ("no/such/folder", "is not a folder"),
        ("org/model", "hf download org/model"),
    ],
)
def test_what_is_no_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"'{name}' .*{message}"):
        model_folder(name, tmp_path / "cache")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two revisions of owner/tiny, their folders in ``tmp_path``, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in ("main", "v2"):
        (tmp_path / revision).mkdir()
        (tmp_path / revision / "config.json").write_text(json.dumps({"revision": revision}))
    make_hub_cache(tmp_path / "hub", "owner/tiny", {name: tmp_path / name for name in ("main", "v2")})
    return tmp_path


@pytest.mark.parametrize("find", [model_folder, cached_model_folder])
def test_a_revision_of_the_hub_can_be_pinned(hub: Path, find: Callable[..., Path | None]) -> None:
    for revision, expected in ((None, "main"), ("main", "main"), ("v2", "v2"), (f"{2:040x}", "v2")):
        folder = find("owner/tiny", hub / "cache", revision)
        assert folder is not None
        assert json.loads((folder / "config.json").read_text()) == {"revision": expected}


def test_a_revision_that_is_not_there(hub: Path) -> None:
    assert cached_model_folder("owner/tiny", hub / "cache", "v3") is None
    with pytest.raises(UserError, match=r"at revision 'v3'.*`hf download owner/tiny --revision v3`"):
        model_folder("owner/tiny", hub / "cache", "v3")


@pytest.mark.parametrize("find", [model_folder, cached_model_folder])
@pytest.mark.parametrize("name", ["demo", "main", "no/such/folder"])
def test_only_a_hub_id_has_revisions(
    hub: Path, monkeypatch: pytest.MonkeyPatch, find: Callable[..., object], name: str
) -> None:
    monkeypatch.chdir(hub)
    with pytest.raises(UserError, match=f"model.revision: 'v2' selects a revision .* is '{name}', which is not a hub"):
        find(name, hub / "cache", "v2")
