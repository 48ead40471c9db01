"""Checkpoints that DeepSpeed has written for other people's trainers: real ones, and damaged ones."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qvtune.convert.sources.deepspeed import open_zero, step_folder
from qvtune.convert.sources.names import plain_keys
from qvtune.convert.sources.source import open_source
from qvtune.errors import UserError
from tests.convert.foreign import assert_same, merged_by_peft, merged_by_us
from tests.support.forks import fork_ranks

WORKER = Path(__file__).parents[1] / "deepspeed_worker.py"
# Number of ranks -> what they train one after the other: starting them costs more than all of it.
JOBS = {1: ("trainer-2", "trainer-3"), 2: ("trainer-2", "trainer-3", "sft-2"), 3: ("trainer-2", "trainer-3", "sft-3")}


@pytest.fixture(scope="module", params=JOBS, ids="{} ranks".format)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama_fp32_folder: Path) -> Path:
    """OUTPUT of deepspeed_worker.py for one number of ranks."""
    output = tmp_path_factory.mktemp("deepspeed")
    command = [WORKER, llama_fp32_folder, output, *JOBS[request.param]]
    ranks = fork_ranks(command, request.param, output / "logs", timeout=500)
    assert all(rank.code == 0 for rank in ranks), "\n".join(rank.output for rank in ranks if rank.code not in (0, -9))
    return output


@pytest.mark.distributed
def test_the_masters_are_what_the_library_has_gathered_and_merge_to_what_peft_merges(
    trained: Path, llama_fp32_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # an import of it would fail
    num_ranks = len(list((trained / "logs").glob("stdout-*")))
    base = load_file(llama_fp32_folder / "model.safetensors")
    for job in JOBS[num_ranks]:
        checkpoint = trained / job / "checkpoint-2"
        source = open_source(checkpoint, allow_pickle=True)
        assert (source.kind, source.step) == ("deepspeed", 2)
        assert source.model.name_or_path == str(llama_fp32_folder)
        opened = open_zero(checkpoint / "global_step2")
        assert (opened.stage, len(opened.partitions)) == (int(job[-1]), num_ranks)
        masters, gathered = (
            plain_keys(opened.tensors()),
            plain_keys(load_file(checkpoint / "adapter_model.safetensors")),
        )
        assert masters.keys() == gathered.keys()
        for name, tensor in gathered.items():
            assert torch.equal(masters[name].to(tensor.dtype), tensor), name
        expected = merged_by_peft(llama_fp32_folder, checkpoint, AutoModelForCausalLM).state_dict()
        # TRL trains in bfloat16, and PEFT has saved the masters rounded to that.
        rounded = gathered["lm_head.weight"].dtype == torch.bfloat16
        for place in (checkpoint, checkpoint / "global_step2"):
            found, ours = merged_by_us(place, allow_pickle=True)
            assert_same(found, expected, tolerance=2**-7 if rounded else 1e-6)
            assert len(ours.changes) == 12
        assert not torch.equal(expected["model.norm.weight"], base["model.norm.weight"])  # trained, in its own group


@pytest.mark.distributed
def test_the_adapter_beside_it_needs_no_pickle(trained: Path, llama_fp32_folder: Path) -> None:
    checkpoint = trained / "trainer-3" / "checkpoint-2"
    source = open_source(checkpoint)
    assert (source.kind, source.step) == ("peft", 2)
    expected = merged_by_peft(llama_fp32_folder, checkpoint, AutoModelForCausalLM).state_dict()
    assert_same(merged_by_us(checkpoint)[0], expected)
    with pytest.raises(UserError, match=r"global_step2: DeepSpeed's files are pickles.*--allow-pickle"):
        open_source(checkpoint / "global_step2")


# ---- damaged ones, made by hand in DeepSpeed's layout: one group of two parameters, cut as ZeRO-2 and -3 do


SHAPES = {"a.lora_A.default.weight": torch.Size([3, 5]), "a.lora_B.default.weight": torch.Size([4, 3])}


def write_zero(folder: Path, stage: int, ranks: int, paddings: list[int] | None = None) -> dict[str, torch.Tensor]:
    """A ``global_step`` folder with known parameters, which are returned."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(stage)
    parameters = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    own: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    if stage == 2:
        gaps = paddings or [0, 0]
        flat = torch.cat(
            [torch.cat([p.flatten(), torch.zeros(g)]) for p, g in zip(parameters.values(), gaps, strict=True)]
        )
        flat = torch.cat([flat, torch.zeros(-len(flat) % (2 * ranks))])
        own = [[part] for part in flat.chunk(ranks)]
    else:
        for parameter in parameters.values():
            size = -(-parameter.numel() // ranks)
            padded = torch.cat([parameter.flatten(), torch.zeros(size * ranks - parameter.numel())])
            for rank, part in enumerate(padded.chunk(ranks)):
                own[rank].append(part)
    for rank, parts in enumerate(own):
        groups = {"fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups": parts}
        state: dict[str, Any] = {"partition_count": ranks if stage == 3 else [ranks], **groups}
        if paddings:
            state["param_alignment_paddings"] = [paddings]
        torch.save({"optimizer_state_dict": state}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    module = parameters if stage == 2 else {name: torch.zeros(0) for name in parameters}
    model = {"param_shapes": [dict(SHAPES)], "module": module, "shared_params": {}, "global_steps": 9}
    name = "mp_rank_00" if stage == 2 else "zero_pp_rank_0_mp_rank_00"
    torch.save(model, folder / f"{name}_model_states.pt")
    return parameters


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_partitions_are_put_together(tmp_path: Path, stage: int, ranks: int) -> None:
    expected = write_zero(tmp_path / "global_step9", stage, ranks, [2, 1] if stage == 2 and ranks == 3 else None)
    found = open_zero(tmp_path / "global_step9").tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def rewrite(pattern: str, edit: Callable[[Any], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = next(iter(sorted(folder.glob(pattern))))
        state = torch.load(file, weights_only=True)
        edit(state)
        torch.save(state, file)

    return change


class Foreign:
    """An object that no checkpoint should hold."""


def truncate(folder: Path) -> None:
    file = next(folder.glob("*rank_1_mp*optim*"))
    file.write_bytes(file.read_bytes()[:700])


def of_two_runs(folder: Path) -> None:
    write_zero(folder.parent / "other", 2, 2)
    shutil.copy(next((folder.parent / "other").glob("*rank_1*")), folder)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "last rank": (lambda folder: next(folder.glob("*rank_2_*")).unlink(), "of rank 2 of 3 are missing"),
    "rank between": (lambda folder: next(folder.glob("*rank_1_*optim*")).unlink(), "of rank 1 are missing"),
    "model states": (lambda folder: next(folder.glob("*model*")).unlink(), "no .*_model_states.pt of rank 0"),
    "truncated": (truncate, r"rank_1_mp_rank_00_optim_states\.pt: cannot be read as tensors only"),
    "mixed world sizes": (of_two_runs, "holds files of different runs: 2 files of 3 ranks, 1 files of 2 ranks"),
    "too many ranks": (
        lambda folder: shutil.copy(
            next(folder.glob("*rank_1_*optim*")), folder / "zero_pp_rank_3_mp_rank_00_optim_states.pt"
        ),
        "files of 4 ranks, written by 3",
    ),
    "tensor parallel": (
        lambda folder: shutil.copy(
            next(folder.glob("*rank_1_*optim*")), folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt"
        ),
        "only data parallelism",
    ),
    "twice": (
        lambda folder: shutil.copy(
            next(folder.glob("*rank_1_*optim*")), folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        ),
        "rank 1 is there twice",
    ),
    "no masters": (rewrite("*rank_1_*optim*", lambda state: state["optimizer_state_dict"].clear()), "no fp32 masters"),
    "too short": (
        rewrite(
            "*rank_0_*optim*",
            lambda state: state["optimizer_state_dict"].update(single_partition_of_fp32_groups=[torch.ones(2)]),
        ),
        "parameters take 27 elements, the files hold 22",
    ),
    "another step": (
        rewrite(
            "*rank_0_*optim*", lambda state: state["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].add_(1)
        ),
        r"masters and weights of a\.lora_A\.default\.weight differ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_folders_are_refused(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "global_step9"
    write_zero(folder, 2, 3)
    edit, problem = FAULTS[fault]
    edit(folder)
    with pytest.raises(UserError, match=problem):
        open_zero(folder).tensors()


def test_objects_of_others_are_named_and_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "global_step9"
    write_zero(folder, 3, 1)
    file = next(folder.glob("*optim*"))
    state = torch.load(file, weights_only=True)
    torch.save(state | {"ds_config": Foreign()}, file)
    with pytest.raises(UserError, match=r"objects of .*test_deepspeed\.Foreign"):
        open_zero(folder)


def test_which_step_is_meant(tmp_path: Path) -> None:
    assert step_folder(tmp_path) is None
    for step in (1, 2):
        write_zero(tmp_path / f"global_step{step}", 3, 1)
    with pytest.raises(UserError, match=r"2 folders global_step\* and no file `latest`"):
        step_folder(tmp_path)
    (tmp_path / "latest").write_text("global_step1\n")
    assert step_folder(tmp_path) == tmp_path / "global_step1"
    assert step_folder(tmp_path / "global_step2") == tmp_path / "global_step2"
    (tmp_path / "latest").write_text("global_step7")
    with pytest.raises(UserError, match="names 'global_step7'; there are global_step1, global_step2"):
        step_folder(tmp_path)


def test_the_adapters_configuration_is_looked_for_beside_and_above(tmp_path: Path) -> None:
    write_zero(tmp_path / "checkpoint-9" / "global_step9", 3, 2)
    with pytest.raises(UserError, match=r"no adapter_config\.json beside it or in .*checkpoint-9"):
        open_source(tmp_path / "checkpoint-9", allow_pickle=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    source = open_source(tmp_path / "checkpoint-9", allow_pickle=True)
    assert (source.model.name_or_path, source.step) == ("some/base", 9)
