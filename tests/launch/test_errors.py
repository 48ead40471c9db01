"""Mistakes of the person who types launch/train.py: exit code 2, one message, nothing left behind."""

from pathlib import Path

import pytest
import yaml

from tests.launch.conftest import train, train_forked, without_gpu
from tests.support.lab import Lab

# Name -> arguments after the recipe, and what the message must name.
WRONG: dict[str, tuple[list[str], list[str]]] = {
    "typo_in_an_override": (["train.max_step=3"], ["`train.max_step=3`", "`train.max_steps`?"]),
    "typo_at_the_top": (["--config={wrong}/top.yaml"], ["{wrong}/top.yaml, line 1", "`adaptor`", "`adapter`?"]),
    "typo_in_a_section": (["--config={wrong}/section.yaml"], ["{wrong}/section.yaml, line 2", "`data.trian`"]),
    "pattern_without_a_match": (["optimizer.lr_multipliers.k=2"], ["optimizer.lr_multipliers: 'k'", "q, v"]),
    "missing_data": (["data.train={wrong}/none.jsonl"], ["data.train: ", "{wrong}/none.jsonl"]),
    "missing_evaluation_data": (["data.eval={wrong}/none.jsonl"], ["data.eval: ", "{wrong}/none.jsonl"]),
    "row_that_is_not_json": (["data.train={wrong}/rows.jsonl"], ["{wrong}/rows.jsonl:2: not JSON"]),
    "data_of_other_kinds": (
        ["data.train={wrong}/cut.parquet", "data.eval={{path: {wrong}/both.jsonl, revision: main}}"],
        [
            "data.train: {wrong}/cut.parquet cannot be read as Parquet",
            "data.eval: {wrong}/both.jsonl is on this machine",
        ],
    ),
    "columns_of_two_formats": (["data.train={wrong}/both.jsonl"], ["{wrong}/both.jsonl:1: the columns are those of"]),
    "no_weights": (["model.name_or_path={wrong}/empty"], ["{wrong}/empty: no weights", "model.safetensors"]),
    "pickle_only": (["model.name_or_path={wrong}/pickle"], ["{wrong}/pickle: only pickle", "pytorch_model.bin"]),
    "no_such_attention": (["model.attention=flash_attention_2"], ["flash_attention_2 needs a CUDA device", "auto"]),
    "batch_that_cannot_be_split": (["train.micro_batch_size=4"], ["train.global_batch_size"]),
    "nothing_to_resume": (["checkpoint.resume=always"], ["checkpoint.resume: always", "no checkpoint"]),
}


@pytest.fixture(scope="session")
def wrong(lab: Lab) -> Path:
    """A folder of things that cannot be used."""
    folder = lab.folder / "wrong"
    for name in ("empty", "pickle"):
        (folder / name).mkdir(parents=True)
        for file in (lab.folder / "model").iterdir():
            if file.suffix != ".safetensors":
                (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "pickle" / "pytorch_model.bin").write_bytes(b"")
    good = (lab.folder / "train.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join([good[0], '{"prompt": "what', *good[1:]]))
    (folder / "cut.parquet").write_bytes(b"PAR1" * 9)
    (folder / "both.jsonl").write_text('{"prompt": "2 + 2 =", "completion": " 4", "text": "2 + 2 = 4"}')
    recipe = (lab.folder / "recipe.yaml").read_text()
    (folder / "top.yaml").write_text("adaptor: {rank: 4}\n" + recipe)
    without_data = {key: value for key, value in yaml.safe_load(recipe).items() if key != "data"}
    (folder / "section.yaml").write_text(f"data:\n  trian: {good[0]!r}\n" + yaml.safe_dump(without_data))
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_gives_one_message_and_exit_code_2(lab: Lab, wrong: Path, name: str) -> None:
    words, parts = WRONG[name]
    ended = train_forked(lab, name, *(word.format(wrong=wrong) for word in words))
    message = ended.stderr
    assert ended.code == 2, message
    assert all(line.startswith("error: ") for line in message.splitlines()), message
    assert all(part.format(wrong=wrong) in message for part in parts), message
    assert not lab.run_dir(name).exists()


def test_a_search_for_nan_in_what_is_gathered_is_refused(lab: Lab) -> None:
    ended = train_forked(lab, "nan_check", TORCH_NCCL_NAN_CHECK="1")
    assert ended.code == 2, ended.output
    (message,) = ended.stderr.splitlines()
    assert message.startswith("error: the environment variable TORCH_NCCL_NAN_CHECK is '1'")
    assert not lab.run_dir("nan_check").exists()


@without_gpu
@pytest.mark.parametrize("name", ["typo_in_a_section", "row_that_is_not_json"])
def test_two_ranks_say_it_once(lab: Lab, wrong: Path, name: str) -> None:
    """Under the launcher, which has lines of its own on standard error."""
    words, parts = WRONG[name]
    ended = train(lab, "deepspeed", f"deepspeed-{name}", *(word.format(wrong=wrong) for word in words))
    assert ended.code == 2, ended.output
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert all(sum(part.format(wrong=wrong) in line for line in lines) == 1 for part in parts), ended.output
    assert "Traceback" not in ended.stderr + ended.stdout
    assert not lab.run_dir(f"deepspeed-{name}").exists()
