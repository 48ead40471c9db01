"""The settings of the data, with their types, units and defaults."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from qvtune.config.glue import MATCHED, MISMATCHED, GlueName, is_official, task_in
from qvtune.config.section import Integer, Positive, PositiveNumber, Section


def _column(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise PydanticCustomError(
        "column", "must be the name of a column, or its number (from 1) in a file without a header"
    )


ColumnName = Literal[
    "messages", "conversations", "tools", "prompt", "completion", "instruction", "input", "output", "system", "text",
    "text_pair", "label",
]  # fmt: skip
Column = Annotated[str | int, BeforeValidator(_column), WithJsonSchema({"type": "text or whole number > 0"})]
RowFormat = Literal["auto", "chat", "prompt_completion", "instruction", "text", "labelled"]
LossOn = Literal["answers", "last_answer", "completion", "all"]


class SourceSection(Section):
    """A source of rows, in `data.train` or `data.eval`. A text there is the same as `{path: TEXT}`."""

    path: str = Field(
        description="file, folder or pattern (`rows/*.jsonl`); hub id (`owner/name`); a task of GLUE (`glue/sst2`); or "
        "`demo`"
    )
    glue: GlueName | None = Field(
        default=None,
        description="the rows are those of this task of GLUE, whose columns and labels are known; none = by the path "
        "or the columns",
    )
    name: str | None = Field(default=None, description="configuration of a hub data set, where it has several")
    split: str | None = Field(
        default=None,
        description="split of a hub data set or of a folder; none = the only one; demo: train or eval; GLUE: train, in "
        "data.eval validation",
    )
    revision: str | None = Field(
        default=None, description="commit, tag or branch of a hub id; none = the newest version on the hub"
    )
    streaming: bool = Field(
        default=False, description="read a hub data set without a copy of its files on the disk; tokens are kept anyway"
    )
    weight: PositiveNumber | None = Field(
        default=None,
        description="share of the rows that are trained on, relative to the other sources' weights; none (in all "
        "sources) = each row once per epoch",
    )
    max_rows: Positive | None = Field(default=None, description="read only so many rows, from the first on")
    format: RowFormat | None = Field(default=None, description="format of the rows; none = data.format")
    columns: dict[ColumnName, Column] = Field(
        default_factory=dict,
        description="where the file has other names: `{prompt: question, completion: answer}`; or numbers from 1 in a "
        "CSV or TSV file without a header",
    )
    loss_on: LossOn | None = Field(default=None, description="what is trained on; none = data.loss_on")


SOURCE = "<source>"  # in the location of an error: what follows is in a SourceSection
_TEXT, _LIST, _SETS, _NOTHING = "<text>", "<list>", "<sets>", "<nothing>"
TAGS = (SOURCE, _TEXT, _LIST, _SETS, _NOTHING)


def _kind(value: Any) -> str:
    if isinstance(value, Mapping | SourceSection):
        return SOURCE
    return _LIST if isinstance(value, list | tuple) else _TEXT


def _kind_or_sets(value: Any) -> str:
    """A mapping without any key of a source has the names of evaluation sets for keys."""
    if value is None:
        return _NOTHING
    is_sets = isinstance(value, Mapping) and value and not SourceSection.model_fields.keys() & value.keys()
    return _SETS if is_sets else _kind(value)


def _not_empty(sources: tuple[Any, ...]) -> tuple[Any, ...]:
    if not sources:
        raise PydanticCustomError("no_source", "must have at least one source")
    return sources


def _set_name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name):
        raise PydanticCustomError("set_name", "must have a name of letters, digits, '_', '-' and '.'")
    return name


_PathOrSource = Annotated[str, Tag(_TEXT)] | Annotated[SourceSection, Tag(SOURCE)]
_SourceList = Annotated[
    tuple[Annotated[_PathOrSource, Discriminator(_kind)], ...], AfterValidator(_not_empty), Tag(_LIST)
]
Sources = Annotated[
    _PathOrSource | _SourceList, Discriminator(_kind), WithJsonSchema({"type": "text, source, or list of these"})
]
_Sets = Annotated[dict[Annotated[str, AfterValidator(_set_name)], Sources], Tag(_SETS)]
SourcesOrSets = Annotated[
    _PathOrSource | _SourceList | _Sets | Annotated[None, Tag(_NOTHING)],
    Discriminator(_kind_or_sets),
    WithJsonSchema({"type": "text, source, list of these, mapping: name of a set -> these, or null"}),
]


class DataSection(Section):
    """Training and evaluation rows, and how they are packed."""

    train: Sources = Field(
        default="demo",
        description="file, folder, pattern or hub id; `glue/sst2` = a task of GLUE; `demo` = questions on the Python "
        "standard library; a source with the settings below; or a list of these",
    )
    eval: SourcesOrSets = Field(
        default=None, description="the same, or several named sets `{name: source}`; null = no evaluation"
    )
    format: RowFormat = Field(default="auto", description="format of the rows; auto = by the keys of the first row")
    loss_on: LossOn = Field(
        default="answers",
        description="what is trained on: answers = all of the assistant's, and completions; last_answer; completion = "
        "what follows the prompt; all = every token",
    )
    max_length: Annotated[Integer, Field(ge=8)] = Field(default=1024, description="tokens per row")
    packing: bool | Literal["dense"] = Field(
        default=True,
        description="several documents per row; each attends only to itself; dense = with less padding, in other rows",
    )
    on_long_row: Literal["cut", "split", "drop"] = Field(
        default="cut",
        description="a document of more than max_length tokens: cut = its first max_length; split = several documents; "
        "drop = leave it out; all are counted. Rows of text are always split",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error",
        description="a row that cannot be used: error = refuse the data; skip = leave it out and log the number",
    )
    num_workers: Positive | None = Field(
        default=None, description="processes that tokenize; none = one for each core that the process may run on"
    )

    @field_validator("train")
    @classmethod
    def _all_weights_or_none(cls, train: Any) -> Any:
        weighted = [source.weight is not None for source in _listed(train)]
        if any(weighted) and not all(weighted):
            raise PydanticCustomError("some_weights", "must have a `weight` for each source, or for none")
        return train

    @field_validator("eval")
    @classmethod
    def _no_weights(cls, sets: Any) -> Any:
        sources = [source for one in (sets.values() if isinstance(sets, dict) else [sets]) for source in _listed(one)]
        if any(source.weight is not None for source in sources):
            raise PydanticCustomError("eval_weight", "must have no `weight`: each row is used once")
        return sets

    @property
    def train_sources(self) -> tuple[SourceSection, ...]:
        """The sources of ``train``, with everything that they take over from this section filled in."""
        return self._resolved(self.train, "train")

    @property
    def eval_sets(self) -> dict[str, tuple[SourceSection, ...]]:
        """Name -> sources of each evaluation set; a set without a name is called ``eval``.

        GLUE's MNLI, where no split is named, has two: ``matched`` and ``mismatched``, after the name of the set if
        there is one.
        """
        if self.eval is None:
            return {}
        sets = self.eval if isinstance(self.eval, dict) else {"": self.eval}
        found = {}
        for name, sources in sets.items():
            resolved = self._resolved(sources, "eval")
            for part, selected in _halves(resolved).items():
                found[".".join(filter(None, (name, part))) or "eval"] = selected
        return found

    def _resolved(self, sources: Any, use: Literal["train", "eval"]) -> tuple[SourceSection, ...]:
        return tuple(
            one.model_copy(
                update={
                    "format": one.format or self.format,
                    "loss_on": one.loss_on or self.loss_on,
                    "glue": one.glue or task_in(one.path),
                    "split": one.split or _default_split(one, use),
                }
            )
            for one in _listed(sources)
        )


def _default_split(source: SourceSection, use: Literal["train", "eval"]) -> str | None:
    if source.path == "demo":
        return use
    if task_in(source.path) or (source.glue and is_official(Path(source.path))):
        return "train" if use == "train" else "validation"
    return None


def _halves(sources: tuple[SourceSection, ...]) -> dict[str, tuple[SourceSection, ...]]:
    """The evaluation sets that these sources are: "" -> all of them, or where MNLI's is among them its two."""
    is_mnli = [source.glue == "mnli" and source.split == "validation" for source in sources]
    if not any(is_mnli):
        return {"": sources}
    return {
        half: tuple(
            source.model_copy(update={"split": f"validation_{half}"}) if of_mnli else source
            for source, of_mnli in zip(sources, is_mnli, strict=True)
        )
        for half in (MATCHED, MISMATCHED)
    }


def _listed(sources: Any) -> list[SourceSection]:
    """All that may be written for sources, as a list."""
    listed = () if sources is None else sources if isinstance(sources, tuple) else (sources,)
    return [SourceSection(path=one) if isinstance(one, str) else one for one in listed]
