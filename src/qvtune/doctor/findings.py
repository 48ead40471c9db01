"""Findings of the doctor: on one host, and between hosts."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

Status = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check: what was found, and what to do about it. Only ``fail`` keeps a run from starting."""

    check: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """One node's findings; ``facts`` must be equal on all nodes, ``figures`` are compared in other ways."""

    node: int
    host: str
    findings: tuple[Finding, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)

    def with_more(self, *findings: Finding, **figures: Any) -> Self:
        """A copy with further findings and figures."""
        more = {**self.figures, **figures}
        return type(self)(self.node, self.host, (*self.findings, *findings), self.facts, more)

    def as_json(self) -> dict[str, Any]:
        """Plain values; the inverse of ``from_json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The report that another node has sent."""
        return cls(**{**value, "findings": tuple(Finding(**entry) for entry in value["findings"])})


Verdict = tuple[str, Finding]  # host, what was found there
SEVERAL = "several nodes"  # instead of a host: a failure that is attributed to no single node
RECIPE = "recipe"  # name of the check that reports what training would refuse
NOT_COMPARED = "not compared"  # a fact that this node cannot know yet


def verdicts(reports: Iterable[Report]) -> list[Verdict]:
    """Every finding with its host."""
    return [(report.host, finding) for report in reports for finding in report.findings]


def outliers(values: Mapping[str, Any]) -> list[str]:
    """The hosts whose value is not the most common one; all hosts if two values are equally common."""
    counts = Counter(values.values()).most_common()
    if len(counts) < 2:
        return []
    if counts[0][1] == counts[1][1]:
        return list(values)
    return [host for host, value in values.items() if value != counts[0][0]]


def to_exclude(found: Sequence[Verdict], hosts: Sequence[str]) -> list[str]:
    """Hosts without which the others could run: those with a failed check that has not failed on all hosts.

    Of the recipe each problem counts as a check of its own: one may be everybody's, another that of one host.
    """
    failed: dict[tuple[str, str], set[str]] = {}
    for host, finding in found:
        if finding.status == "fail":
            check = (finding.check, finding.detail if finding.check == RECIPE else "")
            failed.setdefault(check, set()).add(host)
    named = {host for on in failed.values() if len(on) < len(hosts) for host in on}
    return [host for host in hosts if host in named]
