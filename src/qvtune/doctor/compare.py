"""Comparison of all nodes, on the master: which are missing, and which differ from the others."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median

from qvtune.doctor.collective import CHECK
from qvtune.doctor.findings import NOT_COMPARED, SEVERAL, Finding, Report, Verdict, outliers
from qvtune.doctor.network import REACH

REPORT = "report"
_CLOCK_SECONDS = 5.0
_REMEDIES = {
    "code": "use one copy on all nodes: a shared folder, or launch/submit.py, which makes a copy for the job",
    "base": "copy or download the base again, or use a folder that all nodes share (model.name_or_path)",
    "attention": "request one type of GPU (--constraint, --gpus-per-node=TYPE:N), or set model.attention",
}
_DATA_REMEDY = "copy the file again, or use one that all nodes share"
_VERSION_REMEDY = "make env on that node, or use one environment that all nodes share"


def compare(reports: Mapping[int, Report], hosts: Sequence[str], seconds: float) -> list[Verdict]:
    """Findings that name the host at fault; missing reports were waited for during ``seconds``."""
    missing = [host for node, host in enumerate(hosts) if node not in reports]
    remedy = "check the node: srun -w HOST hostname, scontrol show node HOST, its slurmd.log; or exclude it"
    found = [
        (host, Finding(REPORT, "fail", f"none within {seconds:.0f} s by network or run folder", remedy))
        for host in missing
    ]
    ordered = [reports[node] for node in sorted(reports)]
    return found + _facts(ordered) + _shared_folder(ordered) + _clocks(ordered) + _peers(ordered, hosts)


def _facts(reports: Sequence[Report]) -> list[Verdict]:
    found = []
    names = dict.fromkeys(name for report in reports for name in report.facts)
    for name in names:
        values = {report.host: report.facts.get(name, "not known") for report in reports}
        values = {host: value for host, value in values.items() if value != NOT_COMPARED}
        different = outliers(values)
        usual = Counter(values.values()).most_common(1)[0][0] if values else ""
        remedy = _REMEDIES.get(name) or (_DATA_REMEDY if name.startswith("data.") else _VERSION_REMEDY)
        for host in different:
            rest = "; no value has a majority" if len(different) == len(values) else f", on most nodes {usual}"
            found.append((host, Finding(f"same {name}", "fail", f"{values[host]} here{rest}", remedy)))
    if not found and len(reports) > 1:
        found.append((reports[0].host, Finding("same on all", "ok", ", ".join(names))))
    return found


def _shared_folder(reports: Sequence[Report]) -> list[Verdict]:
    """Whether all nodes see the same marker files, and so share the folder."""
    views = {report.host: tuple(report.figures["sees"]) for report in reports if "sees" in report.figures}
    apart = outliers(views)
    remedy = "mount the shared file system there, or put run_dir on one that all nodes have"
    return [
        (host, Finding("run folder shared", "fail", f"sees the files of nodes {list(views[host])} only", remedy))
        for host in apart
    ] or [(host, Finding("run folder shared", "ok", f"by {len(views)} nodes")) for host in list(views)[:1]]


def _clocks(reports: Sequence[Report]) -> list[Verdict]:
    """Clocks against their median. Of two nodes, the one whose clock differs from the file system's is named."""
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
    """Connections between all nodes. At fault is one that most cannot reach, else one that cannot connect."""
    cut = [(report.host, hosts[other]) for report in reports for other in report.figures.get("unreachable", ())]
    by_target = Counter(target for _, target in cut)
    tested = sum("unreachable" in report.figures for report in reports)
    found: dict[str, list[str]] = {}
    for source, target in cut:
        at_fault = target if tested > 2 and 2 * by_target[target] > tested - 1 else source
        found.setdefault(at_fault, []).append(f"{source} -> {target}")
    remedy = "all ports must be open between the nodes: firewall, interface, name resolution"
    if tested > 1 and not found:
        return [(reports[0].host, Finding("between nodes", "ok", "every node can connect to every other"))]
    return [
        (host, Finding("between nodes", "fail", f"no connection {', '.join(pairs)}", remedy))
        for host, pairs in found.items()
    ]


def attribute(found: Sequence[Verdict], hosts: Sequence[str]) -> list[Verdict]:
    """The same findings, where those that one node's fault causes on others are attributed to that node, or to none."""
    return _attribute_collective(_attribute_to_master(found, hosts))


def _attribute_to_master(found: Sequence[Verdict], hosts: Sequence[str]) -> list[Verdict]:
    """If none of several nodes reaches the master, the master is at fault."""
    failed = _failed(found, REACH)
    if len(failed) < 2 or len(failed) < len(hosts) - 1:
        return list(found)
    first = failed[0][1]
    of_master = Finding(REACH, "fail", f"no other node reaches it; {failed[0][0]}: {first.detail}", first.remedy)
    return [verdict for verdict in found if verdict not in failed] + [(hosts[0], of_master)]


def _attribute_collective(found: Sequence[Verdict]) -> list[Verdict]:
    """One failing rank makes all fail: only a node whose message differs from that of most nodes is at fault."""
    failed = _failed(found, CHECK)
    if not failed:
        return list(found)
    (usual, count), *_ = Counter(finding for _, finding in failed).most_common(1)
    other = [verdict for verdict in failed if verdict[1] != usual] if 2 * count > len(failed) else []
    return [verdict for verdict in found if verdict not in failed] + other + [(SEVERAL, usual)]


def _failed(found: Sequence[Verdict], check: str) -> list[Verdict]:
    return [(host, finding) for host, finding in found if finding.check == check and finding.status == "fail"]
