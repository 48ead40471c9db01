"""What a person sees of a step."""

import pytest

from qvtune.report.step_display import StepDisplay


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def test_a_step_is_one_line_with_every_groups_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with StepDisplay(first_step=0, max_steps=200, visible=True) as display:
        display.step(7, loss=2.34567, tokens_per_second=812.34, grad_norm=0.5, lr={"q": 1e-4, "v": 4e-4})
        display.say("step 7: checkpoint runs/demo")
    lines = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert len(lines) == 2
    wanted = ["step   7/200", "loss 2.3457", "812.3 tokens/s", "grad norm 0.500", "q 1.00e-04", "v 4.00e-04"]
    assert [part for part in wanted if part not in lines[0]] == []
    assert lines[1] == "step 7: checkpoint runs/demo"


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with StepDisplay(first_step=0, max_steps=2, visible=False) as display:
        display.step(1, loss=1.0, tokens_per_second=1.0, grad_norm=1.0, lr={"q": 1e-4})
        display.say("anything")
    assert capsys.readouterr().out.strip() == ""
