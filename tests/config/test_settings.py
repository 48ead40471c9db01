"""The table of settings that is shown and documented."""

import pytest

from qvtune.config.data import SourceSection
from qvtune.config.generate import GenerateSection
from qvtune.config.schema import RunConfig
from qvtune.config.settings import SOURCE_SECTION, TOP_LEVEL, markdown, sections, show_settings
from qvtune.errors import UserError
from tests.config.test_load import SETTINGS
from tests.launch.test_commands import PARTS
from tests.support.documentation import COMMANDS_README, names_of_generated_parts, with_generated_parts


def shown(capsys: pytest.CaptureFixture[str], section: str = "") -> str:
    show_settings(section)
    return capsys.readouterr().out


def test_every_setting_is_there_once_with_its_meaning() -> None:
    named = [setting.name for settings in sections().values() for setting in settings]
    groups = set(sections()) - {TOP_LEVEL, SOURCE_SECTION}
    optional = {SOURCE_SECTION: SourceSection, "train.generate": GenerateSection}
    inside = [f"{path}.{name}" for path, section in optional.items() for name in section.model_fields]
    assert sorted(named) == sorted({*SETTINGS, *inside} - groups)
    unexplained = [one.name for settings in sections().values() for one in settings if len(one.description) < 10]
    assert unexplained == []


@pytest.mark.parametrize(
    ("name", "type_", "default"),
    [
        ("run_dir", "text", "required"),
        ("model.quantization", "nf4, none", "nf4"),
        ("model.double_quant", "true or false", "true"),
        ("adapter.projections", "list of: q, k, v, o, gate, up, down", "[q, v]"),
        ("adapter.rank", "whole number > 0", "16"),
        ("adapter.dropout", "number >= 0, < 1", "0.0"),
        ("optimizer.lr_multipliers", "mapping: text -> number > 0", "{}"),
        ("optimizer.betas", "list of 2: number >= 0, < 1", "[0.9, 0.999]"),
        ("schedule.warmup_ratio", "number >= 0, <= 1", "0.03"),
        ("train.max_steps", "whole number > 0 or null", "null"),
        ("train.generate.prompts", "text, or list of texts or null", "null"),
        ("train.generate.max_new_tokens", "whole number > 0", "128"),
        ("data.train", "text, source, or list of these", "demo"),
        ("data.train.columns", "mapping: text -> text or whole number > 0", "{}"),
        ("data.eval", "text, source, list of these, mapping: name of a set -> these, or null", "null"),
    ],
)
def test_types_and_defaults_are_in_words(name: str, type_: str, default: str) -> None:
    (setting,) = [one for settings in sections().values() for one in settings if one.name == name]
    assert (setting.type, setting.default) == (type_, default)


def test_all_or_one_section_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    everything = shown(capsys)
    assert "optimizer.betas" in everything and "[0.9, 0.999]" in everything and "run_dir" in everything
    one = shown(capsys, "checkpoint")
    fields = RunConfig.model_fields["checkpoint"].default.model_dump()
    assert [line.split()[0] for line in one.splitlines() if line.startswith("checkpoint.")] == [
        f"checkpoint.{key}" for key in fields
    ]
    assert "optimizer" not in one


def test_an_unknown_section_is_refused() -> None:
    with pytest.raises(UserError, match=r"--settings optimzer: no such section; did you mean `optimizer`\?"):
        show_settings("optimzer")


def test_the_readme_of_the_commands_shows_the_table_and_every_help_as_they_are() -> None:
    """To write them: python -m tests.support.documentation"""
    text = COMMANDS_README.read_text()
    commands = sorted(path.stem for path in COMMANDS_README.parent.glob("*.py"))
    parts = [f"{command} {part}" for command, parts in PARTS.items() for part in parts]
    assert sorted(names_of_generated_parts(text)) == sorted([*commands, *parts, "settings"])
    assert markdown() in text
    # Words, as versions of Python break lines and name groups in their own ways.
    assert with_generated_parts(text).split() == text.split()
