"""What the doctor has found: on one host, and between hosts."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

Status = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line: ``detail`` is what was found, ``remedy`` what to do about it. Only ``fail`` means no-go."""

    check: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """One node's findings, and what must be equal on all nodes (``facts``) or is compared otherwise (``figures``)."""

    node: int
    host: str
    findings: tuple[Finding, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)

    def with_more(self, *findings: Finding, **figures: Any) -> Self:
        """The same with further findings and figures."""
        more = {**self.figures, **figures}
        return type(self)(self.node, self.host, (*self.findings, *findings), self.facts, more)

    def as_json(self) -> dict[str, Any]:
        """Plain values, from which ``from_json`` makes the report again."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The report that another node has handed in."""
        return cls(**{**value, "findings": tuple(Finding(**entry) for entry in value["findings"])})


Verdict = tuple[str, Finding]  # host, what was found there
NOBODY = "together"  # in the place of a host: what shows on several and blames none of them


def verdicts(reports: Iterable[Report]) -> list[Verdict]:
    """Every finding with its host."""
    return [(report.host, finding) for report in reports for finding in report.findings]


def outliers(values: Mapping[str, Any]) -> list[str]:
    """The hosts whose value is not that of the most; all of them when no value has more hosts than any other."""
    counts = Counter(values.values()).most_common()
    if len(counts) < 2:
        return []
    if counts[0][1] == counts[1][1]:
        return list(values)
    return [host for host, value in values.items() if value != counts[0][0]]


def to_exclude(found: Sequence[Verdict], hosts: Sequence[str]) -> list[str]:
    """Hosts without which the rest would be fit: those with a failed check that has not failed everywhere."""
    failed: dict[str, set[str]] = {}
    for host, finding in found:
        if finding.status == "fail":
            failed.setdefault(finding.check, set()).add(host)
    named = {host for on in failed.values() if len(on) < len(hosts) for host in on}
    return [host for host in hosts if host in named]
