"""eval_rows.jsonl: each document of the evaluation sets by itself, on 1, 2 and 3 ranks, and after a kill."""

import json

import pytest

from tests.distributed.conftest import CLASSIFIERS, Results
from tests.support.lab import MAX_STEPS, Lab

LABELS = ("no", "perhaps", "yes")


def test_losses_of_documents_do_not_depend_on_the_number_of_ranks(
    lab: Lab, one: Results, two: Results, three: Results
) -> None:
    """Two sets, of one source and of two; the metrics of the event are those of the rows together."""
    lines = {name: lab.eval_rows(name) for name in ("mixture", "mixture-on-one", "mixture-on-three")}
    for name, found in lines.items():
        assert [(line["step"], line["set"]) for line in found] == [
            (step, name) for step in (0, MAX_STEPS) for name in ("few", "both")
        ]
        for line, expected in zip(found, lines["mixture"], strict=True):
            assert line["tokens"] == expected["tokens"] and min(line["tokens"]) > 0
            # the order of float32 sums over ranks, while training, is another
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            event = next(one for one in lab.events(name, "eval") if one["step"] == line["step"])
            mean = sum(line["loss"]) / sum(line["tokens"])
            assert mean == pytest.approx(event["sets"][line["set"]]["loss"], rel=1e-6)
    few, both = lines["mixture"][:2]
    assert (len(few["loss"]), len(both["loss"])) == (7, 67)
    assert both["loss"][-7:] == pytest.approx(few["loss"], rel=1e-5), "source after source"


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_predictions_are_in_the_order_of_the_file(
    lab: Lab, one: Results, two: Results, three: Results, name: str
) -> None:
    kind = CLASSIFIERS[name].kind
    rows = [json.loads(line) for line in (lab.folder / "eval" / f"{kind}.jsonl").read_text().splitlines()]
    labels = [row["label"] if kind == "scores" else LABELS.index(row["label"]) for row in rows]
    for suffix in CLASSIFIERS[name].launches:
        found, events = lab.eval_rows(f"{name}-{suffix}"), lab.events(f"{name}-{suffix}", "eval")
        assert [line["step"] for line in found] == [event["step"] for event in events] == [0, MAX_STEPS]
        for line, event in zip(found, events, strict=True):
            assert (line["set"], line["label"], line["tokens"]) == ("eval", labels, [1] * 13)
            assert sum(line["loss"]) / 13 == pytest.approx(event["loss"], rel=1e-12)
            if kind == "classes":
                right = sum(map(int.__eq__, line["prediction"], labels))
                assert right / 13 == pytest.approx(event["accuracy"])
            else:
                squared = [(score - label) ** 2 for score, label in zip(line["prediction"], labels, strict=True)]
                assert line["loss"] == pytest.approx(squared)


def test_a_killed_run_has_each_evaluation_once(lab: Lab, two: Results, two_later: Results) -> None:
    """Killed after step 4 and its evaluation, resumed from the checkpoint of step 3."""
    assert [event["step"] for event in lab.events("killed", "eval")].count(4) == 2
    assert [line["step"] for line in lab.eval_rows("killed")] == list(range(MAX_STEPS + 1))
    assert lab.eval_rows("killed")[-1] == lab.eval_rows("bert-on-two")[-1], "as without the kill, bit for bit"


def test_without_the_evaluation_before_the_first_step(lab: Lab, one: Results, two: Results) -> None:
    before, *others = lab.events("plain", "eval")
    found = lab.events("not-at-start", "eval")
    assert before["step"] == 0 and [entry["step"] for entry in found] == [entry["step"] for entry in others]
    # the order of float32 sums over ranks, while training, is another
    assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in others], rel=1e-5)
