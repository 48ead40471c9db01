"""Merging runs by what their base is: an NF4 folder, and a base that has changed since."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvtune.convert.convert import convert
from qvtune.errors import UserError
from qvtune.model.quantize import quantize
from tests.convert.conftest import MakeRun
from tests.support.tiny import ENCODERS, make_model_folder


def test_a_run_on_an_nf4_folder_merges_to_the_same_as_one_on_its_source(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path
) -> None:
    quantize(llama_folder, tmp_path / "nf4")
    convert(make_run(llama_folder), tmp_path / "from-source")
    convert(make_run(tmp_path / "nf4"), tmp_path / "from-nf4")
    expected = load_file(tmp_path / "from-source" / "model.safetensors")
    found = load_file(tmp_path / "from-nf4" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    assert "quantization_config" not in (tmp_path / "from-nf4" / "config.json").read_text()
    assert not (tmp_path / "from-nf4" / "nf4_manifest.json").exists()


def test_a_base_that_has_changed_since_is_refused_by_tensor_and_leaves_nothing(
    make_run: MakeRun, tmp_path: Path
) -> None:
    base = make_model_folder(tmp_path / "base")
    run = make_run(base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 0.25
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' is .*(?s:.)*another base"):
        convert(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".merged")]


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_in_a_checkpoint_with_a_head_is_the_one_that_was_trained(
    make_run: MakeRun, tmp_path: Path, family: str
) -> None:
    base = make_model_folder(tmp_path / "base", family)
    run = make_run(base, quantization="none")
    convert(run, tmp_path / "merged")
    before, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == merged.keys()
    changed = [name for name in before if not torch.equal(before[name].float(), merged[name].float())]
    assert len(changed) == 4 and all(name.startswith(f"{family}.encoder.layer.") for name in changed)
    before[f"{family}.embeddings.word_embeddings.weight"][3, 5] += 0.25
    save_file(before, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"'embeddings\.word_embeddings\.weight' is .*(?s:.)*another base"):
        convert(run, tmp_path / "refused")
    with pytest.raises(UserError, match=r"decoder\.weight' of the architecture is missing"):  # NF4 leaves the head out
        convert(make_run(base), tmp_path / "refused", base_weights="original")
    assert not list(tmp_path.glob("*refused*"))
