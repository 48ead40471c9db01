"""What a task of GLUE says of problem, labels and metric."""

import pytest

from qvtune.config.schema import ClassificationSection
from qvtune.errors import UserError
from qvtune.tasks.glue import glue_settings


def section(**settings: object) -> ClassificationSection:
    return ClassificationSection.model_validate(settings)


@pytest.mark.parametrize(
    ("name", "problem", "num_labels", "metric"),
    [
        ("cola", "single_label", 2, "matthews"),
        ("sst2", "single_label", 2, "accuracy"),
        ("mrpc", "single_label", 2, "accuracy"),
        ("stsb", "regression", 0, "pearson"),
        ("qqp", "single_label", 2, "accuracy"),
        ("mnli", "single_label", 3, "accuracy"),
        ("qnli", "single_label", 2, "accuracy"),
        ("rte", "single_label", 2, "accuracy"),
    ],
)
def test_what_is_not_set_is_known(name: str, problem: str, num_labels: int, metric: str) -> None:
    found = glue_settings(section(), name)
    assert (found.problem, len(found.labels or ()), found.metric) == (problem, num_labels, metric)
    assert glue_settings(found, name) == found


def test_what_is_set_stays() -> None:
    found = glue_settings(section(labels=["equivalent", "not_equivalent"], metric="f1"), "mrpc")
    assert found.labels == ("equivalent", "not_equivalent") and found.metric == "f1"


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        ({"problem": "regression"}, "sst2", "classification.problem: regression, but GLUE's sst2 is single_label"),
        ({"problem": "single_label"}, "stsb", "classification.problem: single_label, but GLUE's stsb is regression"),
        ({"metric": "f1"}, "stsb", r"one of the metrics auto, loss, pearson, spearman.* \(as GLUE's stsb has\)"),
        ({"labels": ["low", "high"]}, "stsb", "must not have labels with problem: regression"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, object], name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        glue_settings(section(**settings), name)
