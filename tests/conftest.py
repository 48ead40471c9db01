"""Fixtures for all tests; what they are made of is in tests/support/tiny.py."""

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from qvtune.system import heavy_imports
from tests.support.forks import stop_server

with heavy_imports():
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from qvtune.config.schema import AdapterSection, ModelSection
    from qvtune.distributed import process_group
    from qvtune.model.adapters import add_adapters, trainable
    from qvtune.model.loader import load_whole
    from qvtune.tasks.causal_lm import CausalLMObjective
    from tests.support.tiny import make_model_folder, make_tokenizer

TESTS = Path(__file__).parent
MARKED_FOLDERS = ("distributed", "launch", "slurm")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of some folders with the folder's name, so that ``-m`` can select them."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What has been imported and collected stays: the garbage collector need not look at it again and again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Everything here is too small to share; threads that wait for each other take many times longer."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True, scope="session")
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own, as the folders of the next run may have the same names; lines as wide as in a log file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        patch.setenv("QVTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_process_survives() -> Iterator[None]:
    """The fork server is started by the first test that needs it."""
    yield
    stop_server()


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes several processes, done by this one without a process group."""
    monkeypatch.setattr(process_group, "all_gather_object", lambda own: [own])
    monkeypatch.setattr(process_group, "barrier", lambda: None)
    monkeypatch.setattr(process_group, "raise_on_all_ranks", nullcontext)
    monkeypatch.setattr(process_group, "broadcast_object", lambda value: value)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA in bfloat16. Shared: read only."""
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def llama_fp32_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32."""
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama-fp32", dtype=torch.float32)


@pytest.fixture(scope="session")
def make_objective(llama_fp32_folder: Path) -> Callable[..., CausalLMObjective]:
    def make(folder: Path = llama_fp32_folder, attention: str = "sdpa", **model: Any) -> CausalLMObjective:
        """The module that is trained, around a tiny model in float32. The same at every call.

        B of the adapters is not 0, as it would be after some steps.
        """
        base = load_whole(folder, ModelSection(**model), torch.float32, attention)
        adapted = add_adapters(base, AdapterSection(rank=4), str(folder), seed=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for name, parameter in trainable(adapted):
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.2)
        return CausalLMObjective(adapted)

    return make
