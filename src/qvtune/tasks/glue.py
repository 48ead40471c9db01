"""What is known of a task of GLUE before any row has been read: its problem, its labels and its metric."""

from pydantic import ValidationError

from qvtune.config.glue import GLUE
from qvtune.config.problems import describe
from qvtune.config.schema import ClassificationSection, RunConfig
from qvtune.errors import UserError


def glue_settings(section: ClassificationSection, name: str) -> ClassificationSection:
    """``section`` with problem, labels and metric of a task of GLUE where they are not set.

    Raises UserError for what is set and does not go together with the task.
    """
    task = GLUE[name]
    problem = "single_label" if task.labels else "regression"
    if "problem" in section.model_fields_set and section.problem != problem:
        raise UserError(f"classification.problem: {section.problem}, but GLUE's {name} is {problem}; leave it out")
    labels = section.labels or task.labels or None
    metric = task.metric if section.metric == "auto" else section.metric
    try:
        return ClassificationSection.model_validate({"problem": problem, "labels": labels, "metric": metric})
    except ValidationError as error:
        reasons = [describe(one, RunConfig, ("classification",)) for one in error.errors()]
        raise UserError([f"{reason} (as GLUE's {name} has)" for reason in reasons]) from error
