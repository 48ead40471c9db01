"""Which model folders are accepted, and that a skeleton costs no memory."""

import json
from pathlib import Path

import pytest
import torch

from qvtune.config.schema import ModelSection
from qvtune.errors import UserError
from qvtune.model.families import FAMILIES
from qvtune.model.nf4 import NF4Linear
from qvtune.model.skeleton import build_skeleton, read_model_config, require_forward
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
    with pytest.raises(UserError, match=r"config\.json"):
        read_model_config(tmp_path, ModelSection())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_of_every_family_runs_without_memory(tmp_path: Path, family: str) -> None:
    folder = make_model_folder(tmp_path / family, family)
    require_forward(read_model_config(folder, ModelSection()), ModelSection())


def test_a_config_that_transformers_refuses_is_the_models_error(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    change_config(folder, head_dim=15)
    with pytest.raises(UserError, match=r"(?s)config\.json: .*even rotary dimension, but got `head_dim`=15"):
        read_model_config(folder, ModelSection())


def test_a_model_that_cannot_be_built_or_run_fails_by_its_name(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    change_config(folder, num_key_value_heads=3)  # of 4 heads
    with pytest.raises(UserError, match=rf"{folder}/config\.json: transformers cannot run its forward: RuntimeError"):
        require_forward(read_model_config(folder, ModelSection()), ModelSection())
    change_config(folder, num_key_value_heads=2, hidden_act="no_such_function")
    with pytest.raises(
        UserError, match=r"cannot build the model: KeyError: .no_such_function.\. The model itself fails"
    ):
        build_skeleton(read_model_config(folder, ModelSection()), ModelSection(), torch.float32, "sdpa")
