"""Problems of a person: which setting led to them, and all of them at once."""

import pytest

from qvtune.errors import Problems, ProofError, UserError, naming_setting


def test_the_setting_is_named_where_it_is_known() -> None:
    with pytest.raises(ProofError) as raised, naming_setting("data.train"):
        raise ProofError(["rows.jsonl:1: not JSON", "1 more bad row"])
    assert raised.value.problems == ("data.train: rows.jsonl:1: not JSON", "data.train: 1 more bad row")
    assert str(raised.value) == "\n".join(raised.value.problems)


def test_the_innermost_name_stays() -> None:
    with pytest.raises(UserError) as raised, naming_setting("model"), naming_setting("model.name_or_path"):
        raise UserError("no such folder")
    assert raised.value.problems == ("model.name_or_path: no such folder",)


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(KeyError), naming_setting("data.train"):
        raise KeyError("x")


def _fail(*problems: str) -> None:
    raise UserError(problems)


def test_problems_of_several_checks_are_raised_together() -> None:
    problems = Problems()
    assert problems.attempt(lambda: 3) == 3
    problems.raise_all()
    assert problems.attempt(lambda: _fail("a", "b")) is None
    assert problems.attempt(lambda: _fail("b", "c")) is None
    with pytest.raises(UserError) as raised:
        problems.raise_all()
    assert raised.value.problems == ("a", "b", "c")
