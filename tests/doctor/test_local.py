"""What one node finds out alone."""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qvtune import versions
from qvtune.config.schema import RunConfig
from qvtune.distributed.place import Place, find_place
from qvtune.doctor import devices, software, storage
from qvtune.doctor.needs import needs_of
from qvtune.errors import UserError
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.loader import load_whole
from qvtune.storage.safetensors import open_weights
from tests.support.tiny import make_model_folder

GOOD = {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "bitsandbytes": "0.50.2"}
STEP = {
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "0",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_GPUS_PER_NODE": "h100:8",
}


@pytest.fixture(autouse=True)
def _slurm_expands(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, stdout="n1\nn2\nn3\n")
    monkeypatch.setattr("qvtune.distributed.place.subprocess.run", lambda *args, **options: done)


def place(**changes: Any) -> Place:
    values: dict[str, Any] = {"node": 0, "hosts": ("a", "b"), "job": "1.0", "port": 1, "gpus_asked": 8}
    return Place(**{**values, "gpus_granted": 8, "processes": 8, "on_cpus": False, **changes})


def test_the_place_in_a_step() -> None:
    assert find_place(3, None, STEP) == Place(1, ("n1", "n2", "n3"), "12345.0", 29465, 8, 8, 8, on_cpus=False)
    found = find_place(None, None, STEP | {"QVTUNE_PROCS_PER_NODE": "2", "QVTUNE_MASTER_PORT": "7"})
    assert (found.processes, found.on_cpus, found.port, found.world_size, found.host) == (2, True, 7, 6, "n2")
    assert not find_place(None, None, STEP | {"QVTUNE_PROCS_PER_NODE": "8"}).on_cpus


def test_the_place_of_one_machine() -> None:
    found = find_place(None, None, {})
    assert (found.node, len(found.hosts), found.processes, found.gpus_asked, found.gpus_granted) == (
        0,
        1,
        1,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("nodes", "environment", "message"),
    [
        (None, STEP | {"SLURM_NTASKS": "6"}, "6 processes on 3 nodes"),
        (4, STEP, "4 nodes are expected, 3"),
        (None, {"SLURM_JOB_NUM_NODES": "4"}, "4 nodes are expected, 1"),
    ],
)
def test_one_process_a_node_on_all_nodes(nodes: int | None, environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_place(nodes, None, environment)


@pytest.mark.parametrize(
    ("changes", "visible", "num_cuda", "expected"),
    [
        ({}, "0,1,2,3,4,5,6,7", 8, ("ok", "8 seen")),
        ({}, None, 8, ("ok", "8 seen")),
        ({"gpus_asked": None, "gpus_granted": None, "processes": 1}, None, 0, ("ok", "none asked")),
        ({"gpus_granted": 4}, "0,1,2,3", 4, ("fail", "granted 4 of the 8")),
        ({}, "0,1", 2, ("fail", "CUDA_VISIBLE_DEVICES=0,1 leaves 2 of 8")),
        ({}, "0,1,2,3,4,5,6,6", 8, ("fail", "twice")),
        ({}, "0,1,2,3,4,5,6,7", 0, ("fail", "torch sees 0 of the 8")),
        ({"gpus_granted": None}, None, 7, ("fail", "torch sees 7 of the 8")),
        ({"processes": 1, "on_cpus": True}, "0,1,2,3,4,5,6,7", 0, ("note", "1 processes on CPUs")),
        ({"processes": 1, "on_cpus": True}, "", 0, ("note", "1 processes on CPUs")),
        ({"processes": 1, "on_cpus": True, "gpus_granted": 2}, "0,1", 0, ("fail", "granted 2 of the 8")),
    ],
)
def test_gpus(changes: dict[str, Any], visible: str | None, num_cuda: int, expected: tuple[str, str]) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    (finding,) = devices.check_gpus(place(**changes), environment, num_cuda)
    assert finding.status == expected[0] and expected[1] in finding.detail, finding


def test_versions() -> None:
    lines = ["torch >=2.13", "deepspeed >=0.19.8,<0.20", 'flash-attn >=2; extra == "cuda"']
    assert [finding.status for finding in software.check_versions(GOOD, lines)] == ["ok"]
    old = software.check_versions(GOOD | {"deepspeed": "0.19.7"}, lines)
    assert [finding.status for finding in old] == ["fail"] * 3
    assert "deepspeed 0.19.7, needed <0.20,>=0.19.8" in old[0].detail and "ZeRO-3 (DeepSpeed #8148)" in old[2].detail
    missing = software.check_versions(GOOD, ["no-such-package"])
    assert missing[0].detail == "no-such-package is missing, needed any"


def test_the_installed_versions_are_fit() -> None:
    lines = software.requirements()
    assert len(lines) > 10
    assert [finding.status for finding in software.check_versions(versions.installed(), lines)] == ["ok"]


def run_config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate({"run_dir": "run", "train": {"max_steps": 1}, **changes})


def test_a_changed_file_has_another_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    config = run_config(data={"train": str(file), "eval": "demo"})
    facts, findings = software.data_facts(config)
    assert findings[0].status == "fail" and facts["data.train"].startswith("missing")
    monkeypatch.setattr(software, "_WHOLE_BYTES", 128)
    seen = set()
    for at in (None, 0, 5000, 9999):  # blocks of 2 bytes, 156 apart: only the ends are surely in one
        file.write_bytes(bytes(10000) if at is None else bytes(at) + b"x" + bytes(9999 - at))
        seen.add(software.data_facts(config)[0]["data.train"])
    assert len(seen) >= 2 and all(fact.startswith("10000 bytes ") for fact in seen)
    monkeypatch.setattr(software, "_WHOLE_BYTES", 1 << 20)
    assert software.data_facts(config)[0]["data.train"] not in seen


def test_the_base_is_known_by_its_headers(tmp_path: Path, llama_folder: Path) -> None:
    fact = software.base_fact(open_weights(llama_folder))
    assert fact == software.base_fact(open_weights(llama_folder))
    other = make_model_folder(tmp_path / "model", intermediate_size=102)
    assert software.base_fact(open_weights(other)) != fact


@pytest.mark.parametrize(
    ("double_quant", "adapter"), [(True, {"rank": 4}), (False, {"rank": 4}), (True, {"method": "full"})]
)
def test_needs_are_those_of_the_loaded_model(llama_folder: Path, double_quant: bool, adapter: dict[str, Any]) -> None:
    """3 %: padding of blocks."""
    config = run_config(model={"name_or_path": str(llama_folder), "double_quant": double_quant}, adapter=adapter)
    needs = needs_of(config, open_weights(llama_folder), 1, torch.float32)
    model = load_whole(llama_folder, config.model, torch.float32, adapter=config.adapter)
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert needs.base == pytest.approx(held, rel=0.03)
    half = needs_of(config, open_weights(llama_folder), 2, torch.float32)
    assert half.base == pytest.approx(needs.base / 2, abs=1)
    trained = sum(p.numel() for _, p in trainable(add_adapters(model, config.adapter, "base", seed=0)))
    assert needs.checkpoint == 16 * trained + (1 << 20)


def test_a_good_folder(tmp_path: Path) -> None:
    folder = storage.probe_folder(tmp_path / "not" / "yet", "1.0")
    assert folder == tmp_path / ".doctor-1.0"
    findings, offset = storage.check_storage(folder, 3, 1000, 2)
    assert {finding.status for finding in findings if finding.check != "file speed"} == {"ok"}
    assert offset is not None and abs(offset) < 5
    assert [path.name for path in folder.iterdir() if path.name.startswith("marker")] == ["marker-3"]
    assert storage.visible_markers(folder, 3, [3], seconds=0) == [3]
    assert storage.visible_markers(folder, 3, [1, 3], seconds=0.3) == [3]
    storage.remove_probes(folder)
    storage.remove_probes(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_space_for_the_checkpoints(tmp_path: Path) -> None:
    findings, _ = storage.check_storage(tmp_path / "probes", 0, 1 << 50, 3)
    assert [finding.check for finding in findings if finding.status == "fail"] == ["disk"]
    assert findings[0].detail.endswith(f"take {5 * 2**50 / 1e9:.2f} GB")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    findings, offset = storage.check_storage(tmp_path / "file" / "probes", 0, 0, 1)
    assert offset is None
    assert [(finding.check, finding.status) for finding in findings] == [("run folder", "fail")]


@pytest.mark.parametrize(("ahead", "status"), [(0, "ok"), (4, "ok"), (300, "fail"), (-300, "fail")])
def test_a_clock_that_is_not_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float, status: str
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + ahead)
    findings, offset = storage.check_storage(tmp_path / "probes", 0, 0, 1)
    assert offset == pytest.approx(ahead, abs=0.9)
    assert {finding.check: finding.status for finding in findings}["clock"] == status
