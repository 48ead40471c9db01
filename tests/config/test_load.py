"""The strict configuration: what is accepted, and that every mistake is named with its place and its remedy."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

import pytest
import yaml
from pydantic import BaseModel

from qvtune.config.data import SourceSection
from qvtune.config.load import dump_config, load_config
from qvtune.config.schema import RunConfig, TrainSection
from qvtune.errors import UserError

RECIPES = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.yaml"))
SMALLEST = "run_dir: runs/x\ntrain: {max_steps: 3}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def problems_of(folder: Path, text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load_config(write(folder, text), overrides)
    return caught.value.problems


def only_problem(folder: Path, text: str, *overrides: str) -> str:
    problems = problems_of(folder, text, *overrides)
    assert len(problems) == 1, problems
    return problems[0]


def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings_of(field.annotation, f"{prefix}{name}.")


SETTINGS = list(settings_of(RunConfig))


def test_discovery_finds_recipes_and_settings() -> None:
    assert {path.stem for path in RECIPES} >= {"demo", "glue_sst2", "llama3_8b_qv", "llama3_70b_qv"}
    assert len(SETTINGS) >= 40


def test_names_that_other_parts_rely_on_are_there() -> None:
    contract = {
        "model": "name_or_path quantization double_quant dtype attention trust_remote_code",
        "adapter": "method projections rank alpha dropout",
        "optimizer": "lr lr_multipliers betas eps weight_decay max_grad_norm",
        "schedule": "name warmup_ratio min_ratio",
        "data": "train eval format loss_on max_length packing on_bad_row",
        "train": "max_steps epochs global_batch_size micro_batch_size seed eval_every save_every "
        "activation_checkpointing stop_after_step",
        "checkpoint": "keep resume",
    }
    wanted = {f"{section}.{key}" for section, keys in contract.items() for key in keys.split()}
    assert wanted | {"task", "deepspeed", "run_dir"} <= set(SETTINGS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_comes_back_equal_from_its_dump(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert config.run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_command_hardware_memory_and_time(path: Path) -> None:
    head = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for word in (f"launch/train.py --config launch/recipes/{path.name}", "Hardware", "Memory", "Time"):
        assert word in head


def test_dump_writes_every_default_and_survives_awkward_values(tmp_path: Path) -> None:
    text = (
        SMALLEST
        + r"""
optimizer:
  eps: 1e-12
  lr_multipliers: {'layers\.(0|1)\..*q_proj(?=\.lora)': 0.5, v: 4, ".*": 1.5}
"""
    )
    overrides = ["model.name_or_path='2024'", "task=sequence_classification", "classification.labels=['no', 'yes']"]
    config = load_config(write(tmp_path, text), overrides)
    dumped = dump_config(config)
    assert load_config(write(tmp_path, dumped)) == config
    assert list(yaml.safe_load(dumped)["optimizer"]["lr_multipliers"]) == list(config.optimizer.lr_multipliers)
    for key in SETTINGS:
        node = yaml.safe_load(dumped)
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_a_section_of_another_task_is_neither_taken_nor_written(tmp_path: Path) -> None:
    assert "classification" not in yaml.safe_load(dump_config(load_config(write(tmp_path, SMALLEST))))
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, SMALLEST), ["classification.metric=f1"])
    (problem,) = caught.value.problems
    assert "with task: causal_lm classification.metric must not be set (or set task: sequence" in problem


@pytest.mark.parametrize("overrides", [["train.eval_every=5"], ["data.eval=demo"]])
def test_early_stopping_needs_evaluations(tmp_path: Path, overrides: list[str]) -> None:
    with pytest.raises(UserError, match=r"train\.early_stopping needs data\.eval and train\.eval_every > 0"):
        load_config(write(tmp_path, SMALLEST), ["train.early_stopping=3", *overrides])
    load_config(write(tmp_path, SMALLEST), ["train.early_stopping=3", "train.eval_every=5", "data.eval=demo"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.generate={}"], "train.generate` is {}; it must have exactly one of prompts, file and rows"),
        (["train.generate={prompts: [a], rows: 3}"], "must have exactly one of prompts, file and rows"),
        (["train.generate={prompts: []}"], "`train.generate.prompts` is []"),
        (["train.generate.rows=3"], "train.generate.rows are rows of data.eval, which is not set"),
        (["train.generate={rows: 3, final_answer: '(('}", "data.eval=demo"], "must be a regular expression ("),
        (["train.generate={rows: 3, final_answer: x}", "data.eval=demo"], "must have one group, in parentheses"),
        (["train.best_metric=exact_match"], "with best_metric: exact_match must have generate.rows"),
        (
            ["task=sequence_classification", "train.generate={prompts: a}"],
            "task: sequence_classification generates no text and has its own classification.metric: train.generate",
        ),
        (["train.generate={promts: [a]}"], "did you mean `train.generate.prompts`?"),
    ],
)
def test_answers_that_cannot_be_generated(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in only_problem(tmp_path, SMALLEST, *overrides)


def test_one_prompt_or_several(tmp_path: Path) -> None:
    for written, prompts in (("a b", ("a b",)), ("[a, b]", ("a", "b"))):
        config = load_config(write(tmp_path, SMALLEST), [f"train.generate.prompts={written}"])
        assert config.train.generate is not None and config.train.generate.prompts == prompts


def test_results_of_evaluation_rows_need_some(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.eval_rows needs data\.eval, which is not set"):
        load_config(write(tmp_path, SMALLEST), ["train.eval_rows=true"])
    load_config(write(tmp_path, SMALLEST), ["train.eval_rows=true", "data.eval=demo"])


@pytest.mark.parametrize("setting", ["as_in_paper=true", "head_weight_decay=0.1"])
def test_a_setting_of_a_head_needs_a_head(tmp_path: Path, setting: str) -> None:
    with pytest.raises(UserError, match=rf"no classification head: optimizer\.{setting.partition('=')[0]} must not"):
        load_config(write(tmp_path, SMALLEST), [f"optimizer.{setting}"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{labels: [a, b], problem: regression}", "must not have labels with problem: regression"),
        ("{labels: [a, b, a]}", "must name each label once"),
        ("{labels: [a]}", "at least 2 items"),
        (
            "{metric: pearson}",
            "must have with problem: single_label one of the metrics auto, loss, accuracy, f1, matthews",
        ),
        (
            "{problem: regression, metric: f1}",
            "must have with problem: regression one of the metrics auto, loss, pearson, spearman",
        ),
    ],
)
def test_settings_of_classification_that_do_not_go_together(tmp_path: Path, settings: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, SMALLEST + f"task: sequence_classification\nclassification: {settings}\n"))
    (problem,) = caught.value.problems
    assert message in problem and "classification" in problem


def test_number_without_a_dot_is_a_number(tmp_path: Path) -> None:
    assert yaml.safe_load("1e-4") == "1e-4"  # YAML 1.1: the reason for this test
    config = load_config(write(tmp_path, SMALLEST + "optimizer: {lr: 1e-4}"), ["optimizer.eps=1e-7"])
    assert (config.optimizer.lr, config.optimizer.eps) == (1e-4, 1e-7)


def test_heading_with_nothing_under_it_means_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, SMALLEST + "optimizer:\ndata:\n")) == load_config(write(tmp_path, SMALLEST))


# --- overrides


def test_overrides_set_sections_top_level_keys_lists_and_null(tmp_path: Path) -> None:
    overrides = ["run_dir=elsewhere", "train.max_steps=null", "train.epochs=2", "adapter.projections=[q, k, v]"]
    config = load_config(write(tmp_path, SMALLEST), [*overrides, "optimizer.lr_multipliers={k: 2}"])
    assert config.run_dir == "elsewhere"
    assert (config.train.max_steps, config.train.epochs) == (None, 2.0)
    assert config.adapter.projections == ("q", "k", "v")
    assert config.optimizer.lr_multipliers == {"k": 2.0}


def test_later_override_wins(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALLEST), ["train.seed=1", "train={epochs: 1, seed: 2}", "train.seed=3"])
    assert config.train == TrainSection(epochs=1, seed=3)


def test_override_sets_one_entry_of_a_mapping_and_keeps_the_order(tmp_path: Path) -> None:
    text = SMALLEST + "optimizer: {lr_multipliers: {v: 2, q: 1}}"
    config = load_config(write(tmp_path, text), ["optimizer.lr_multipliers.v=4", "optimizer.lr_multipliers.o=3"])
    assert list(config.optimizer.lr_multipliers.items()) == [("v", 4.0), ("q", 1.0), ("o", 3.0)]


@pytest.mark.parametrize("pattern", ["v", r"layers\.0\.self_attn", r"q_proj(?=\.lora_B)", "a=b", "[.]", "x.y=.z="])
def test_key_of_a_mapping_ends_at_the_last_equals_sign(tmp_path: Path, pattern: str) -> None:
    config = load_config(write(tmp_path, SMALLEST), [f"optimizer.lr_multipliers.{pattern}=2.5"])
    assert config.optimizer.lr_multipliers == {pattern: 2.5}


def test_value_may_hold_an_equals_sign(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, SMALLEST), ["run_dir=a=b"]).run_dir == "a=b"


@pytest.mark.parametrize(
    "override", ["train.seed", "=3", "train..seed=1", ".seed=1", "optimizer.lr_multipliers.=2", ""]
)
def test_override_of_another_form_is_refused(tmp_path: Path, override: str) -> None:
    problem = only_problem(tmp_path, SMALLEST, override)
    assert f"command line, `{override}`" in problem
    assert "section.key=value" in problem


def test_override_that_is_not_yaml_is_refused(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, SMALLEST, "adapter.projections=[q,")
    assert "command line, `adapter.projections=[q,`: the value is not YAML" in problem


def test_override_below_a_single_value_does_not_replace_it(tmp_path: Path) -> None:
    assert "`run_dir` is 'runs/x' and has no keys" in only_problem(tmp_path, SMALLEST, "run_dir.name=1")


# --- unknown keys


def misspelt(key: str) -> str:
    section, dot, name = key.rpartition(".")
    return f"{section}{dot}{name}{name[-1]}x"


def nested(key: str) -> dict[str, Any]:
    first, dot, rest = key.partition(".")
    return {first: nested(rest) if dot else 1}


@pytest.mark.parametrize("key", [key for key in SETTINGS if key not in ("train.max_steps", "train", "run_dir")])
@pytest.mark.parametrize("source", ["file", "command line"])
def test_typo_in_any_key_is_named_with_its_place_and_the_closest_key(tmp_path: Path, key: str, source: str) -> None:
    typo = misspelt(key)
    if source == "file":
        tree = {"run_dir": "x", "train": {"max_steps": 1}}
        for name, value in nested(typo).items():
            tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value  # type: ignore[dict-item]
        text = yaml.safe_dump(tree, sort_keys=False)
        line = next(i for i, line in enumerate(text.splitlines(), 1) if line.strip().startswith(typo.split(".")[-1]))
        problem = only_problem(tmp_path, text)
        assert problem.startswith(f"{tmp_path / 'recipe.yaml'}, line {line}: ")
    else:
        problem = only_problem(tmp_path, SMALLEST, f"{typo}=1")
        assert problem.startswith(f"command line, `{typo}=1`: ")
    assert f"`{typo}` is not a setting" in problem
    assert "did you mean" in problem
    assert f"`{key}`" in problem


def test_key_of_another_section_is_said_to_belong_there(tmp_path: Path) -> None:
    assert "did you mean `adapter.rank`?" in only_problem(tmp_path, SMALLEST, "train.rank=8")
    assert "`data.max_length`" in only_problem(tmp_path, SMALLEST, "model.max_lenght=8")
    assert "`optimizer.lr`" in only_problem(tmp_path, SMALLEST, "lr=8")


def test_key_like_no_other_gets_the_list_of_allowed_ones(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, SMALLEST, "checkpoint.zzz=1")
    assert problem.endswith("`checkpoint.zzz` is not a setting; allowed: keep, resume, max_failed_saves")


# --- values


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.micro_batch_size=0", "greater than 0"),
        ("train.micro_batch_size=1.5", "whole number"),
        ("train.seed=1e3", "whole number"),
        ("train.seed=-1", "greater than or equal to 0"),
        ("train.seed=yes", "must be a number"),
        ("data.max_length=7", "greater than or equal to 8"),
        ("optimizer.lr=fast", "must be a number"),
        ("optimizer.lr=.inf", "finite"),
        ("optimizer.lr=.nan", "finite"),
        ("optimizer.lr_multipliers.v=0", "greater than 0"),
        ("optimizer.lr_multipliers.v=true", "must be a number"),
        ("optimizer.lr_multipliers={1: 2}", "a key must be text"),
        ("optimizer.lr_multipliers=4", "must be a mapping"),
        ("optimizer.betas=[0.9, 1.0]", "less than 1"),
        ("optimizer.betas=[0.9]", "`optimizer.betas[1]` is not set"),
        ("adapter.dropout=1", "less than 1"),
        ("adapter.projections=q", "must be a list"),
        ("adapter.projections=[]", "at least 1 item"),
        ("adapter.projections=[q, q]", "each projection once"),
        ("adapter.projections=[q, w]", "allowed: q, k, v, o"),
        ("schedule.warmup_ratio=1.1", "less than or equal to 1"),
        ("schedule.name=cosin", "allowed: constant, linear, cosine; did you mean `cosine`?"),
        ("model.quantization=NF4", "allowed: nf4, none"),
        ("model.double_quant=perhaps", "true or false"),
        ("checkpoint.resume=true", "allowed: never, if_available, always"),
        ("data.train=2026", "put it in quotes"),
        ("data.train=2026-01-01", "put it in quotes"),
        ("data=4", "must be a section"),
        ("run_dir=null", "must be text"),
    ],
)
def test_bad_value_is_named_with_what_is_allowed(tmp_path: Path, override: str, said: str) -> None:
    problem = only_problem(tmp_path, SMALLEST, override)
    assert problem.startswith(f"command line, `{override}`: `{override.split('=')[0].split('.')[0]}")
    assert said in problem
    assert "Input should" not in problem


def test_sources_are_texts_mappings_lists_and_named_sets(tmp_path: Path) -> None:
    text = """
data:
  train: [a.jsonl, {path: b, max_rows: 2, columns: {prompt: question, completion: 2}}, demo]
  eval: {mathematics: {path: c, split: test}, all: [d, {path: e, format: text, loss_on: all}]}
  format: chat
"""
    config = load_config(write(tmp_path, SMALLEST + text))
    first, second, demo = config.data.train_sources
    assert first == SourceSection(path="a.jsonl", format="chat", loss_on="answers")
    assert (second.path, second.max_rows, second.columns) == ("b", 2, {"prompt": "question", "completion": 2})
    assert (demo.path, demo.split) == ("demo", "train")
    sets = config.data.eval_sets
    assert [(name, [one.path for one in sources]) for name, sources in sets.items()] == [
        ("mathematics", ["c"]),
        ("all", ["d", "e"]),
    ]
    assert (sets["mathematics"][0].split, sets["mathematics"][0].format) == ("test", "chat")
    assert (sets["all"][1].format, sets["all"][1].loss_on) == ("text", "all")
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_weights_are_for_all_sources_of_train_or_for_none(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST)
    weighted = load_config(path, ["data.train=[{path: a, weight: 0.5}, {path: b, weight: 2}]"])
    assert [source.weight for source in weighted.data.train_sources] == [0.5, 2.0]
    assert [source.weight for source in load_config(path, ["data.train=[a, b]"]).data.train_sources] == [None, None]
    some = only_problem(tmp_path, SMALLEST, "data.train=[{path: a, weight: 0.5}, b]")
    assert "`data.train` is [" in some and "it must have a `weight` for each source, or for none" in some
    for value in ("{path: a, weight: 1}", "[{path: a, weight: 1}]", "{x: [b, {path: a, weight: 1}]}"):
        assert "must have no `weight`" in only_problem(tmp_path, SMALLEST, f"data.eval={value}")


def test_one_source_for_evaluation_is_the_set_eval(tmp_path: Path) -> None:
    for value in ("demo", "{path: demo}", "[demo]"):
        (source,) = load_config(write(tmp_path, SMALLEST), [f"data.eval={value}"]).data.eval_sets["eval"]
        assert (source.path, source.split) == ("demo", "eval")
    assert load_config(write(tmp_path, SMALLEST)).data.eval_sets == {}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{pth: x, split: a}", ["`data.eval.path` is not set", "`data.eval.pth` is not a setting; did you mean"]),
        ("[a, {path: b, max_rows: 0}]", ["`data.eval[1].max_rows` is 0; it must be greater than 0"]),
        ("[]", ["`data.eval` is []; it must have at least one source"]),
        ("[3]", ["`data.eval[0]` is 3; it must be text"]),
        ("{path: 2}", ["`data.eval.path` is 2; it must be text"]),
        ("{a b: x}", ["`data.eval.a b` is 'a b'; it must have a name of letters"]),
        ("{1: x}", ["`data.eval` has the key 1; a key must be text"]),
        ("{one: {path: x, splt: y}}", ["did you mean `data.eval.one.split`?"]),
        ("{path: x, columns: {promt: y}}", ["`data.eval.columns` has the key 'promt'; allowed: ", "`prompt`?"]),
        ("{path: x, columns: {prompt: yes}}", ["`data.eval.columns.prompt` is True; it must be the name of a column"]),
        ("{path: x, format: jsonl}", ["`data.eval.format` is 'jsonl'; allowed: auto, chat"]),
    ],
)
@pytest.mark.parametrize("where", ["file", "command line"])
def test_mistakes_in_sources_are_named_with_their_place(
    tmp_path: Path, value: str, said: list[str], where: str
) -> None:
    if where == "file":
        problems = problems_of(tmp_path, f"{SMALLEST}data:\n  train: x\n  eval: {value}")
    else:
        problems = problems_of(tmp_path, SMALLEST, f"data.eval={value}")
    place = f"{tmp_path / 'recipe.yaml'}, line 5: `" if where == "file" else f"command line, `data.eval={value}`: `"
    assert all(problem.startswith(place) for problem in problems), problems
    assert all(any(part in problem for problem in problems) for part in said), problems


def test_a_source_in_a_list_is_placed_by_its_own_line(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, SMALLEST + "data:\n  train:\n    - a\n    - path: b\n      wieght: 1\n")
    assert problem.startswith(f"{tmp_path / 'recipe.yaml'}, line 7: `data.train[1].wieght` is not a setting")


def test_full_has_no_factors(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, SMALLEST, "adapter.method=full", "adapter.rank=16", "adapter.dropout=0.0")
    assert "adapter" in problem and "trains no low-rank factors: dropout, rank must not be set" in problem
    config = load_config(write(tmp_path, SMALLEST), ["adapter.method=full"])
    assert config.model_dump()["adapter"] == {"method": "full", "projections": ("q", "v"), "biases": False}
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_biases_are_for_the_methods_that_have_them(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, SMALLEST, "adapter.method=bias", "adapter.alpha=16")
    assert "with method: bias trains no low-rank factors: alpha must not be set" in problem
    problem = only_problem(tmp_path, SMALLEST, "adapter.method=lora", "adapter.biases=true")
    assert "adapter" in problem and "with method: lora must not have biases: true" in problem
    for method, biases in (("bias", "false"), ("full", "true")):
        config = load_config(write(tmp_path, SMALLEST), [f"adapter.method={method}", f"adapter.biases={biases}"])
        assert config.adapter.trains_biases and not config.adapter.has_factors
        assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("method=AdaLoRA", "PEFT changes its factors in place after each step"),
        ("method=lora+", "optimizer.lr_multipliers.B=16"),
        ("method=qlora", "method: lora with model.quantization: nf4"),
        ("init=pissa", "out of the base's matrices"),
        ("init=olora", "out of the base's matrices"),
        ("init=eva", "the data's activations at every projection"),
    ],
)
def test_what_is_not_supported_says_why(tmp_path: Path, setting: str, reason: str) -> None:
    problem = only_problem(tmp_path, SMALLEST, f"adapter.{setting}")
    name, value = setting.split("=")
    assert f"`adapter.{name}` is '{value}'; it is not supported: " in problem and reason in problem


def test_orthogonal_factors_have_an_even_rank(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, SMALLEST, "adapter.init=orthogonal", "adapter.rank=5")
    assert "with init: orthogonal must have an even rank" in problem


def test_missing_key_is_named(tmp_path: Path) -> None:
    assert "recipe.yaml: `run_dir` is not set" in only_problem(tmp_path, "train: {max_steps: 3}")


# --- the length of a run


def test_override_that_clashes_with_the_recipe_says_how_to_clear_it(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, SMALLEST, "train.epochs=2")
    assert "`train.max_steps` = 3" in problem
    assert "line 2" in problem
    assert "`train.epochs` = 2 (command line, `train.epochs=2`)" in problem
    assert "`train.max_steps=null`" in problem
    assert load_config(write(tmp_path, SMALLEST), ["train.epochs=2", "train.max_steps=null"]).train.epochs == 2


@pytest.mark.parametrize("text", ["run_dir: x", "run_dir: x\ntrain:", "run_dir: x\ntrain: {seed: 1}"])
def test_run_without_a_length_is_refused(tmp_path: Path, text: str) -> None:
    assert "neither `train.max_steps` nor `train.epochs` is set" in only_problem(tmp_path, text)


def test_schema_itself_refuses_two_lengths() -> None:
    with pytest.raises(ValueError, match="exactly one of max_steps and epochs"):
        TrainSection(max_steps=1, epochs=1)


# --- everything at once, and the file itself


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = """
run_dir: runs/x
modell: {}
optimizer: {lr: -1, lr: 0, lr_multiplier: {v: 4}}
adapter: {projections: [q, q], rnak: 8}
train: {max_steps: 3, epochs: 1, sede: 0}
"""
    problems = problems_of(tmp_path, text, "nonsense", "checkpoint.keep=0", "data.evall=x", "model.dtype=[")
    wanted = [
        "line 4: `optimizer.lr` is set a second time",
        "`nonsense`: not of the form",
        "`model.dtype=[`: the value is not YAML",
        "are both set",
        "line 3: `modell` is not a setting",
        "line 4: `optimizer.lr` is 0",
        "line 4: `optimizer.lr_multiplier` is not a setting; did you mean `optimizer.lr_multipliers`?",
        "line 5: `adapter.projections`",
        "line 5: `adapter.rnak` is not a setting; did you mean `adapter.rank`?",
        "line 6: `train.sede` is not a setting; did you mean `train.seed`?",
        "`checkpoint.keep=0`: `checkpoint.keep` is 0; it must be greater than 0",
        "`data.evall=x`: `data.evall` is not a setting; did you mean `data.eval`",
    ]
    for part in wanted:
        assert sum(part in problem for problem in problems) == 1, (part, problems)
    assert len(problems) == len(wanted)


@pytest.mark.parametrize(
    "text", ["run_dir: x\nrun_dir: y\ntrain: {epochs: 1}", "run_dir: x\ntrain: {epochs: 1, epochs: 1}"]
)
def test_duplicate_key_is_refused(tmp_path: Path, text: str) -> None:
    assert "is set a second time" in only_problem(tmp_path, text)


def test_missing_file_is_reported_with_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, SMALLEST)
    with pytest.raises(UserError, match=r"recipee\.yaml: .*No such file.*files there: recipe\.yaml"):
        load_config(tmp_path / "recipee.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [", "not YAML"),
        (b"a: 2024-99-99", "not YAML"),
        (b"\xff\xfe", "UTF-8"),
        (b"", "holds nothing"),
        (b"- a", "holds a list"),
        (b"text", "holds a str"),
    ],
)
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_config(path)


def test_folder_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


def test_only_lr_multipliers_is_a_mapping_with_free_keys() -> None:
    """The rule for the end of an override's key is documented for this setting; a second one must be documented too."""
    sections = [field.annotation for field in RunConfig.model_fields.values() if isinstance(field.annotation, type)]
    mappings = [
        name
        for section in sections
        if issubclass(section, BaseModel)
        for name, field in section.model_fields.items()
        if get_origin(field.annotation) is dict
    ]
    assert mappings == ["lr_multipliers"]
