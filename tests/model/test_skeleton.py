"""Which model folders are accepted, and that a skeleton costs no memory."""

import json
from pathlib import Path

import pytest
import torch

from qvtune.config.schema import ModelSection
from qvtune.errors import UserError
from qvtune.model.nf4 import NF4Linear
from qvtune.model.skeleton import build_skeleton, read_model_config
from tests.support.tiny import make_model_folder


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_skeleton_has_no_memory_and_real_buffers(llama_folder: Path, quantization: str) -> None:
    section = ModelSection.model_validate({"quantization": quantization})
    skeleton = build_skeleton(read_model_config(llama_folder, section), section, torch.bfloat16, "sdpa")
    parameters = list(skeleton.parameters())
    assert len(parameters) > 10
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in parameters)
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    buffers = dict(skeleton.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert not any(buffer.is_meta for buffer in buffers.values())
    assert any(isinstance(module, NF4Linear) for module in skeleton.modules()) is (quantization == "nf4")


def test_another_family_is_refused(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    change_config(folder, model_type="gemma")
    with pytest.raises(UserError, match="model_type is 'gemma'; supported: llama, mistral"):
        read_model_config(folder, ModelSection())


def test_weights_that_are_quantized_already_are_refused(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="quantized by 'gptq'; give the folder of the original weights"):
        read_model_config(folder, ModelSection())


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no_such_family"}'])
def test_a_config_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"(?s)config\.json.*model\.name_or_path"):
        read_model_config(tmp_path, ModelSection())
