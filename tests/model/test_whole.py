"""The second set of modules: full inside of the context, empty outside; and the arithmetic of its memory."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qvtune.config.schema import AdapterSection, ModelSection
from qvtune.errors import UserError
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.loader import load_whole, open_base
from qvtune.model.whole import WholeModel, cache_bytes, require_room
from tests.support.tiny import make_model_folder

ADAPTER = AdapterSection(rank=4, dropout=0.5)
MODEL = ModelSection()


def both(folder: Path, adapter: AdapterSection = ADAPTER) -> tuple[WholeModel, Any]:
    """The empty modules, and the engine of a model in training mode."""
    empty = add_adapters(open_base(folder, MODEL, torch.float32, "sdpa", adapter).model, adapter, "base", seed=0)
    base = load_whole(folder, MODEL, torch.float32, adapter=adapter)
    trained = add_adapters(base, adapter, "base", seed=1).train()
    for _, parameter in trainable(trained):
        parameter.data += 0.2 * torch.randn_like(parameter)
    engine = SimpleNamespace(module=SimpleNamespace(model=trained), optimizer=None)
    return WholeModel(empty, folder), engine


@pytest.mark.parametrize("tie", [False, True])
def test_it_computes_what_is_trained_without_dropout(tmp_path: Path, tie: bool) -> None:
    whole, engine = both(make_model_folder(tmp_path / "model", tie=tie))
    trained, ids = engine.module.model, torch.arange(3, 20)[None]
    with torch.no_grad(), whole.filled(engine) as model:
        found = model(input_ids=ids).logits
        assert trained.training and not any(module.training for module in model.modules())
    with torch.no_grad():
        assert torch.equal(found, trained.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("method", ["dora", "ia3", "full", "bias"])
def test_it_computes_what_other_methods_train(tmp_path: Path, method: Any) -> None:
    """With all that they hold: magnitudes and norms, vectors, matrices and biases of the base."""
    adapter = AdapterSection(method=method, projections=("k", "v"))
    whole, engine = both(make_model_folder(tmp_path / "model", "qwen2"), adapter)
    trained, ids = engine.module.model.eval(), torch.arange(3, 20)[None]
    with torch.no_grad(), whole.filled(engine) as model:
        torch.testing.assert_close(model(input_ids=ids).logits, trained(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    """Neither after the context nor after an exception in it, such as a request to stop; the trained model stays."""
    whole, engine = both(make_model_folder(tmp_path / "model"))
    before = {name: parameter.data_ptr() for name, parameter in engine.module.model.named_parameters()}
    with whole.filled(engine) as model:
        assert {one.device.type for one in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert {one.device.type for one in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert {name: parameter.data_ptr() for name, parameter in engine.module.model.named_parameters()} == before
    assert {buffer.device.type for buffer in engine.module.model.buffers()} == {"cpu"}
    with suppress(KeyError), whole.filled(engine) as model:
        assert not any(parameter.is_meta for parameter in model.parameters())
        raise KeyError
    assert all(parameter.is_meta for parameter in model.parameters())


def test_settings_of_generation_are_those_of_the_base(tmp_path: Path) -> None:
    """As transformers has them when it loads the folder, with a file of them and without."""
    folder = make_model_folder(tmp_path / "model")
    for text in ('{"eos_token_id": [7, 8]}', None):
        file = folder / "generation_config.json"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        whole, engine = both(folder)
        with whole.filled(engine) as model:
            found = model.generation_config.eos_token_id
        assert found == AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        assert found == ([7, 8] if text else AutoConfig.from_pretrained(folder).eos_token_id)


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    line = require_room(5_700_000_000, 1_000_000_000, 6_700_000_000)
    assert "gathers the base (5.70 GB) and keeps keys and values (1.00 GB); 6.70 GB are free" in line
    with pytest.raises(UserError, match=r"gathers the base \(5\.70 GB\).*6\.60 GB are free.*quantize the base"):
        require_room(5_700_000_000, 1_000_000_000, 6_600_000_000)


def test_keys_and_values_are_counted_as_transformers_keeps_them(llama_fp32_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_fp32_folder)
    cache = model(input_ids=torch.zeros(3, 5, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model.config, 3 * 5, torch.float32) == kept
