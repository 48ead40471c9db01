"""The NF4 folder: what transformers and training make of it, killed starts, damage."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qvtune.config.schema import ModelSection
from qvtune.errors import UserError
from qvtune.model import quantize as module
from qvtune.model.loader import fill, load_whole, open_base
from qvtune.model.quantize import quantize
from qvtune.model.shard import Whole
from qvtune.storage.safetensors import read_headers
from tests.support.forks import fork_command

CPU = torch.device("cpu")
SMALL = 20_000  # bytes of a shard: several files


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def opened(folder: Path, section: ModelSection) -> tuple[Any, Any]:
    """The filled skeleton and the fingerprint."""
    base = open_base(folder, section, torch.float32, "sdpa")
    return base.skeleton, fill(base, Whole(CPU), torch.float32)[1]


@pytest.mark.parametrize("double_quant", [True, False])
def test_training_sees_the_same_bits_and_the_same_base(tmp_path: Path, llama_folder: Path, double_quant: bool) -> None:
    section = ModelSection(double_quant=double_quant)
    quantize(llama_folder, tmp_path / "nf4", double_quant=double_quant, max_shard_bytes=SMALL)
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "nf4").iterdir()), "others are to read them"
    source, of_source = opened(llama_folder, section)
    cached, of_cached = opened(tmp_path / "nf4", section)
    assert of_cached == of_source
    parameters, buffers = dict(source.named_parameters()), dict(source.named_buffers())
    for name, parameter in cached.named_parameters():
        assert torch.equal(parameter.data.view(torch.uint8), parameters[name].data.view(torch.uint8)), name
    for name, buffer in cached.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_transformers_loads_it(tmp_path: Path, llama_fp32_folder: Path) -> None:
    quantize(llama_fp32_folder, tmp_path / "nf4", max_shard_bytes=SMALL)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4").train()
    ours = load_whole(llama_fp32_folder, ModelSection(), torch.float32)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


KILLED = """
import os, sys
from pathlib import Path
from qvtune.model import quantize
write, left = quantize.save_file, int(sys.argv[3])
def dying(tensors, path, metadata):
    global left
    write(tensors, path, metadata=metadata)
    left -= 1
    if left < 0:
        os.truncate(path, 1000)
        os.kill(os.getpid(), 9)
quantize.save_file = dying
quantize.quantize(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=int(sys.argv[4]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("whole_shards", [0, 2])
def test_killed_and_started_again_it_is_the_same_to_the_byte(
    tmp_path: Path, llama_folder: Path, whole_shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(llama_folder, tmp_path / "straight", max_shard_bytes=SMALL)
    output = tmp_path / "killed"
    command = ["-c", KILLED, llama_folder, output, str(whole_shards), str(SMALL)]
    assert fork_command(command, tmp_path / "output", timeout=60).code == -9
    assert not output.exists()
    written: list[str] = []
    save_file = module.save_file

    def noting(tensors: dict[str, torch.Tensor], path: Path, **rest: Any) -> None:
        written.append(path.name)
        save_file(tensors, path, **rest)

    monkeypatch.setattr(module, "save_file", noting)
    quantize(llama_folder, output, max_shard_bytes=SMALL)
    assert contents(output) == contents(tmp_path / "straight")
    assert len(written) == len(list(output.glob("*.safetensors"))) - whole_shards


def test_every_flipped_byte_is_refused_with_the_name_of_the_tensor(tmp_path: Path, llama_folder: Path) -> None:
    quantize(llama_folder, tmp_path / "nf4", max_shard_bytes=SMALL)
    tensors = read_headers(sorted((tmp_path / "nf4").glob("*.safetensors")))
    assert len(tensors) > 80
    for name, tensor in list(tensors.items())[::7]:
        content = bytearray(tensor.file.read_bytes())
        position = tensor.offset + tensor.num_bytes // 2
        content[position] ^= 1
        tensor.file.write_bytes(content)
        with pytest.raises(UserError, match=name.partition(".weight.quant_state")[0].replace(".", r"\.")):
            opened(tmp_path / "nf4", ModelSection())
        content[position] ^= 1
        tensor.file.write_bytes(content)
    opened(tmp_path / "nf4", ModelSection())


def test_what_cannot_be_done_is_said_and_leaves_nothing(tmp_path: Path, llama_folder: Path) -> None:
    quantize(llama_folder, tmp_path / "nf4")
    with pytest.raises(UserError, match=r"--output: .* is not empty"):
        quantize(llama_folder, tmp_path / "nf4")
    with pytest.raises(UserError, match="stored in 4 bits already"):
        quantize(tmp_path / "nf4", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("again")) == []


def test_another_source_does_not_go_on_where_one_stopped(
    tmp_path: Path, llama_folder: Path, llama_fp32_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize(llama_folder, tmp_path / "nf4", max_shard_bytes=SMALL)
    with pytest.raises(UserError, match="work on another checkpoint or base, or with other settings"):
        quantize(llama_fp32_folder, tmp_path / "nf4", max_shard_bytes=SMALL)
    next((tmp_path / ".nf4.partial" / "model").glob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(UserError, match="is missing or not what was written; delete"):
        quantize(llama_folder, tmp_path / "nf4", max_shard_bytes=SMALL)
