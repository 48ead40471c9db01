"""Checks that a node makes alone."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from qvtune import versions
from qvtune.config.generate import GenerateSection
from qvtune.config.schema import RunConfig
from qvtune.distributed.allocation import Allocation, find_allocation
from qvtune.doctor import devices, software, storage
from qvtune.doctor.examine import local_report
from qvtune.doctor.findings import NOT_COMPARED, Report
from qvtune.doctor.needs import Needs, needs_of
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
    monkeypatch.setattr("qvtune.distributed.allocation.subprocess.run", lambda *args, **options: done)


def allocation(**changes: Any) -> Allocation:
    values: dict[str, Any] = {"node": 0, "hosts": ("a", "b"), "job": "1.0", "port": 1, "gpus_requested": 8}
    return Allocation(**{**values, "gpus_granted": 8, "processes": 8, "on_cpus": False, **changes})


def test_the_allocation_of_a_step() -> None:
    assert find_allocation(3, None, STEP) == Allocation(1, ("n1", "n2", "n3"), "12345.0", 29465, 8, 8, 8, on_cpus=False)
    found = find_allocation(None, None, STEP | {"QVTUNE_PROCS_PER_NODE": "2", "QVTUNE_MASTER_PORT": "7"})
    assert (found.processes, found.on_cpus, found.port, found.world_size, found.host) == (2, True, 7, 6, "n2")
    assert not find_allocation(None, None, STEP | {"QVTUNE_PROCS_PER_NODE": "8"}).on_cpus


def test_the_place_of_one_machine() -> None:
    found = find_allocation(None, None, {})
    assert (found.node, len(found.hosts), found.processes, found.gpus_requested, found.gpus_granted) == (
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
        find_allocation(nodes, None, environment)


@pytest.mark.parametrize(
    ("changes", "visible", "num_cuda", "expected"),
    [
        ({}, "0,1,2,3,4,5,6,7", 8, ("ok", "8 seen")),
        ({}, None, 8, ("ok", "8 seen")),
        ({"gpus_requested": None, "gpus_granted": None, "processes": 1}, None, 0, ("ok", "none requested")),
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
    (finding,) = devices.check_gpus(allocation(**changes), environment, num_cuda)
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
    assert findings == [] and facts["data.train"].startswith("not readable")
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


@pytest.mark.parametrize("deepspeed", ["zero3.json", "zero2.json"])
@pytest.mark.parametrize(
    ("double_quant", "adapter"), [(True, {"rank": 4}), (False, {"rank": 4}), (True, {"method": "full"})]
)
def test_needs_are_those_of_the_loaded_model(
    llama_folder: Path, double_quant: bool, adapter: dict[str, Any], deepspeed: str
) -> None:
    """On several ranks: tests/distributed/test_base.py."""
    model_section = {"name_or_path": str(llama_folder), "double_quant": double_quant}
    config = run_config(model=model_section, adapter=adapter, deepspeed=deepspeed)
    needs, weights = needs_of(config, llama_folder, 1, torch.float32)
    model = load_whole(llama_folder, config.model, torch.float32, adapter=config.adapter)
    assert needs.base == sum(parameter.nbytes for parameter in model.parameters())
    assert weights.keys() == open_weights(llama_folder).keys()
    half, _ = needs_of(config, llama_folder, 2, torch.float32)
    assert half.base == (needs.base if deepspeed == "zero2.json" else pytest.approx(needs.base / 2, abs=1000))
    trained = sum(p.numel() for _, p in trainable(add_adapters(model, config.adapter, "base", seed=0)))
    assert needs.checkpoint == half.checkpoint == 16 * trained + (1 << 20)
    values = 0 if config.adapter.method == "full" else 4 * trained
    assert needs.training == values + 16 * trained, "values, gradients, masters and two moments"
    train = config.train.model_copy(update={"generate": GenerateSection(prompts=("hello",))})
    generating, _ = needs_of(config.model_copy(update={"train": train}), llama_folder, 2, torch.float32)
    assert (needs.generation, generating.generation) == (0, 0 if deepspeed == "zero2.json" else needs.base)


@pytest.mark.parametrize(
    ("zero", "on_gpus", "host", "device"),
    [
        ({}, False, 111, 0),
        ({}, True, 100, 11),
        ({"training_on_host": True}, True, 101, 10),
        ({"base_on_host": True}, True, 110, 1),
        ({"base_on_host": True, "training_on_host": True}, True, 111, 0),
        ({"generation": 1000}, False, 1111, 0),
        ({"generation": 1000, "base_on_host": True}, True, 110, 1001),
    ],
)
def test_offloaded_parts_are_in_host_memory(zero: dict[str, Any], on_gpus: bool, host: int, device: int) -> None:
    needs = Needs(base=10, training=1, process=100, checkpoint=0, **zero)
    assert needs.split(on_gpus) == (host, device)


@pytest.mark.parametrize("part", ["base", "training"])
def test_offload_is_read_from_the_deepspeed_json(llama_folder: Path, tmp_path: Path, part: str) -> None:
    key = {"base": "offload_param", "training": "offload_optimizer"}[part]
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3, key: {"device": "cpu"}}}))
    config = run_config(model={"name_or_path": str(llama_folder)}, deepspeed=str(tmp_path / "zero.json"))
    needs, _ = needs_of(config, llama_folder, 1, torch.float32)
    assert (needs.base_on_host, needs.training_on_host) == (part == "base", part == "training")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "what", "completion": " it does"}) + "\n")
    return str(path)


def node_report(model: str, rows: str, **changes: Any) -> Report:
    """Of a node without GPUs."""
    run = run_config(model={"name_or_path": model}, data={"train": rows, "eval": None}, **changes)
    return local_report(find_allocation(None, None, {}), run, None)


def named(report: Report, check: str) -> list[tuple[str, str]]:
    return [(finding.status, finding.detail) for finding in report.findings if finding.check == check]


def test_a_recipe_that_can_run(llama_folder: Path, rows: str) -> None:
    report = node_report(str(llama_folder), rows)
    assert not [finding for finding in report.findings if finding.status != "ok"]
    assert named(report, "recipe") == [("ok", "can run on 1 ranks")]
    assert {"base", "data.train", "torch", "code"} <= report.facts.keys()


def test_a_base_that_cannot_be_trained_is_a_finding(tmp_path: Path, rows: str) -> None:
    """Once, with the reason and what to do; and what else is wrong with the recipe is said as well."""
    GPT2Config(n_layer=1, n_head=2, n_embd=8).save_pretrained(tmp_path / "gpt2")
    report = node_report(str(tmp_path / "gpt2"), rows, optimizer={"lr_multipliers": {"v": 4.0}}, deepspeed="none.json")
    problems = named(report, "recipe")
    assert [status for status, _ in problems] == ["fail", "fail"]
    of_base, of_deepspeed = (detail for _, detail in problems)
    assert "none.json" in of_deepspeed and "model_type is 'gpt2'; supported: llama, " in of_base
    assert all(finding.remedy for finding in report.findings if finding.status == "fail")
    assert report.facts["base"] == "not usable"


def test_data_that_is_not_there_is_a_finding(llama_folder: Path, tmp_path: Path) -> None:
    report = node_report(str(llama_folder), str(tmp_path / "missing.jsonl"))
    ((status, detail),) = named(report, "recipe")
    assert status == "fail" and "data.train" in detail and "missing.jsonl" in detail
    assert report.facts["data.train"].startswith("not readable")


def test_the_embedded_model_is_examined_where_it_is_in_the_cache(
    tmp_path: Path, rows: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QVTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qvtune.embedded.model._convert", lambda *arguments: pytest.fail("converts nothing"))
    report = node_report("demo", rows)
    ((status, detail),) = named(report, "base")
    assert status == "note" and "not in the cache yet" in detail and report.facts["base"] == NOT_COMPARED
    shutil.copytree(llama_folder, tmp_path / "cache" / "smollm2-135m-instruct")
    report = node_report("demo", rows)
    assert named(report, "base")[0][0] == "ok"
    assert report.facts["base"] == software.base_fact(open_weights(llama_folder))["base"]


def test_a_model_of_the_hub_is_examined_where_it_is_in_the_cache(
    tmp_path: Path, rows: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("qvtune.model.source._download", lambda *arguments: pytest.fail("downloads nothing"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (finding,) = [one for one in node_report("owner/tiny", rows).findings if one.check == "base"]
    assert finding.status == "note" and "hf download owner/tiny" in finding.remedy
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (finding,) = [one for one in node_report("owner/tiny", rows).findings if one.check == "base"]
    assert finding.status == "fail" and "HF_HUB_OFFLINE" in finding.detail
    commit = 40 * "a"
    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(llama_folder, repository / "snapshots" / commit)
    report = node_report("owner/tiny", rows)
    assert named(report, "base")[0][0] == "ok" and named(report, "recipe")[0][0] == "ok"
    digest = software.base_fact(open_weights(llama_folder))["base"]
    assert report.facts["base"] == f"{digest} commit {commit}", "another commit is another base"


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
