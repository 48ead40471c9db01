"""What only shows between nodes: who is missing, and who differs from the rest. Computed on the master."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median

from qvtune.doctor.collective import CHECK
from qvtune.doctor.findings import NOBODY, Finding, Report, Verdict, outliers
from qvtune.doctor.network import REACH

_CLOCK_SECONDS = 5.0
_REMEDIES = {
    "code": "all nodes must run one copy: a shared folder, or launch/submit.py, which freezes one",
    "base": "copy the base again, or give a folder that all nodes share (model.name_or_path)",
    "attention": "ask for one type of GPU (--constraint, --gpus-per-node=TYPE:N), or set model.attention",
}
_DATA_REMEDY = "copy the file again, or give one that all nodes share"
_VERSION_REMEDY = "make env on that node, or one environment that all nodes share"


def compare(reports: Mapping[int, Report], hosts: Sequence[str], seconds: float) -> list[Verdict]:
    """Findings that name the host at fault; ``seconds`` is how long the missing were waited for."""
    missing = [host for node, host in enumerate(hosts) if node not in reports]
    remedy = "look at it: srun -w HOST hostname, scontrol show node HOST, its slurmd.log; or exclude it"
    found = [
        (host, Finding("answer", "fail", f"no report within {seconds:.0f} s by network or run folder", remedy))
        for host in missing
    ]
    ordered = [reports[node] for node in sorted(reports)]
    return found + _facts(ordered) + _shared_folder(ordered) + _clocks(ordered) + _peers(ordered, hosts)


def _facts(reports: Sequence[Report]) -> list[Verdict]:
    found = []
    names = dict.fromkeys(name for report in reports for name in report.facts)
    for name in names:
        values = {report.host: report.facts.get(name, "not known") for report in reports}
        different = outliers(values)
        usual = Counter(values.values()).most_common(1)[0][0]
        remedy = _REMEDIES.get(name) or (_DATA_REMEDY if name.startswith("data.") else _VERSION_REMEDY)
        for host in different:
            rest = "; no value has a majority" if len(different) == len(reports) else f", on most nodes {usual}"
            found.append((host, Finding(f"same {name}", "fail", f"{values[host]} here{rest}", remedy)))
    if not found and len(reports) > 1:
        found.append((reports[0].host, Finding("same on all", "ok", ", ".join(names))))
    return found


def _shared_folder(reports: Sequence[Report]) -> list[Verdict]:
    """Nodes that see the same markers share a folder."""
    views = {report.host: tuple(report.figures["sees"]) for report in reports if "sees" in report.figures}
    apart = outliers(views)
    remedy = "mount the shared file system there, or put run_dir on one that all nodes have"
    return [
        (host, Finding("run folder shared", "fail", f"sees the files of nodes {list(views[host])} only", remedy))
        for host in apart
    ] or [(host, Finding("run folder shared", "ok", f"by {len(views)} nodes")) for host in list(views)[:1]]


def _clocks(reports: Sequence[Report]) -> list[Verdict]:
    """Against the middle of all; of two that differ the one is named that differs from the files' clock as well."""
    offsets = {r.host: r.figures["clock_offset"] for r in reports if r.figures.get("clock_offset") is not None}
    if len(offsets) < 2:
        return []
    middle = median(offsets.values())
    off = [host for host, offset in offsets.items() if abs(offset - middle) > _CLOCK_SECONDS]
    if len(offsets) == 2 and max(offsets.values()) - min(offsets.values()) > _CLOCK_SECONDS:
        from_files = {report.host: report.figures.get("file_clock_offset") or 0.0 for report in reports}
        off = [host for host in offsets if abs(from_files[host]) > _CLOCK_SECONDS] or list(offsets)
    remedy = "chronyc tracking (or timedatectl) on this node; start its time service"
    if off:
        shown = "; ".join(f"{host} {offset:+.1f} s" for host, offset in offsets.items())
        return [(host, Finding("clocks", "fail", f"against the master's: {shown}", remedy)) for host in off]
    spread = max(offsets.values()) - min(offsets.values())
    return [(reports[0].host, Finding("clocks", "ok", f"within {spread * 1000:.0f} ms of each other"))]


def _peers(reports: Sequence[Report], hosts: Sequence[str]) -> list[Verdict]:
    """Connections between all nodes: a node that most others cannot reach is at fault, else the one that cannot."""
    cut = [(report.host, hosts[other]) for report in reports for other in report.figures.get("unreachable", ())]
    by_target = Counter(target for _, target in cut)
    asked = sum("unreachable" in report.figures for report in reports)
    found: dict[str, list[str]] = {}
    for source, target in cut:
        at_fault = target if asked > 2 and 2 * by_target[target] > asked - 1 else source
        found.setdefault(at_fault, []).append(f"{source} -> {target}")
    remedy = "all ports must be open between the nodes: firewall, interface, name resolution"
    if asked > 1 and not found:
        return [(reports[0].host, Finding("between nodes", "ok", "every node can connect to every other"))]
    return [
        (host, Finding("between nodes", "fail", f"no connection {', '.join(pairs)}", remedy))
        for host, pairs in found.items()
    ]


def blame(found: Sequence[Verdict], hosts: Sequence[str]) -> list[Verdict]:
    """The same, where a fault of one node shows on others: those findings go to the node, or to none."""
    return _blame_for_collective(_blame_master(found, hosts))


def _blame_master(found: Sequence[Verdict], hosts: Sequence[str]) -> list[Verdict]:
    """When no node of several reaches the master, the master is at fault."""
    failed = _failed(found, REACH)
    if len(failed) < 2 or len(failed) < len(hosts) - 1:
        return list(found)
    first = failed[0][1]
    blamed = Finding(REACH, "fail", f"no other node reaches it; {failed[0][0]}: {first.detail}", first.remedy)
    return [verdict for verdict in found if verdict not in failed] + [(hosts[0], blamed)]


def _blame_for_collective(found: Sequence[Verdict]) -> list[Verdict]:
    """One rank that fails makes all fail: only who says something else than most nodes do is blamed."""
    failed = _failed(found, CHECK)
    if not failed:
        return list(found)
    (usual, count), *_ = Counter(finding for _, finding in failed).most_common(1)
    other = [verdict for verdict in failed if verdict[1] != usual] if 2 * count > len(failed) else []
    return [verdict for verdict in found if verdict not in failed] + other + [(NOBODY, usual)]


def _failed(found: Sequence[Verdict], check: str) -> list[Verdict]:
    return [(host, finding) for host, finding in found if finding.check == check and finding.status == "fail"]
