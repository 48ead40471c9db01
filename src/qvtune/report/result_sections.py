"""Sections of a run's report: answers of the model, merged models, and how the run was made."""

from qvtune.report.chart import Curve, line_chart
from qvtune.report.page import Part, Section, Table, Text
from qvtune.report.run_record import RunRecord, Values, flattened
from qvtune.report.run_sections import MAX_ROWS, section

_PROOF = {  # field -> what it is, how it is written, and its limit
    "top1_agreement": ("same most likely token", "{:.2%}", "at least {:.0%}"),
    "max_abs_difference": ("largest difference of logits", "{:.2e}", "at most {:g}"),
    "mean_kl": ("mean KL(adapted || merged), nats", "{:.2e}", "at most {:g}"),
}


def answers(run: RunRecord) -> Section:
    """What the model answered first and last."""
    found = [entry for entry in run.history.of("generation") if "answers" in entry]
    if not found:
        return Section("Answers", [])
    ends = [found[0]] if len(found) == 1 else [found[0], found[-1]]
    rows = [
        [of_ends[0]["prompt"], *(one["answer"] for one in of_ends), of_ends[-1]["expected"] or ""]
        for of_ends in zip(*(entry["answers"] for entry in ends), strict=False)
    ]
    columns = ["prompt", *(f"answer after step {entry['step']:,}" for entry in ends), "expected"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    title = "" if len(rows) <= MAX_ROWS else f"The first {MAX_ROWS} of {len(rows)}"
    return Section("Answers", [Table(title, columns, rows[:MAX_ROWS], num_labels=len(columns))])


def merges(run: RunRecord) -> Section:
    """The proof of each merged model in the run folder."""
    parts: list[Part | None] = []
    for folder, report in run.merges.items():
        ratios: dict[str, list[float]] = {}
        for update in sorted(report["updates"], key=_layer):
            ratios.setdefault(update["name"].split(".")[-2], []).append(update["ratio"])
        curves = [Curve(name, range(len(values)), values) for name, values in ratios.items()]
        caption = f"{folder}/: norm of each matrix's update relative to that of its weights, by layer."
        chart = line_chart(f"ratios-{folder}", caption, curves, "layer", "update / weights", may_be_log=True)
        parts += [_proof(folder, report), chart]
    return section("Merged model", parts)


def _layer(update: Values) -> tuple[int, ...]:
    return tuple(int(part) for part in update["name"].split(".") if part.isdigit())


def _proof(folder: str, report: Values) -> Table:
    proof, limits = report["proof"], report["proof"]["limits"]
    rows = [
        [what, written.format(proof[field]), "" if limits.get(field) is None else bound.format(limits[field])]
        for field, (what, written, bound) in _PROOF.items()
    ]
    if loss := report.get("losses"):
        what = f"nats per token over {loss['label_tokens']:,} label tokens"
        rows += [[f"{what}: {name}", f"{loss[name]:.4f}", ""] for name in ("before", "adapted", "merged")]
    step = f", step {report['step']:,}" if report.get("step") is not None else ""
    title = f"{folder}/ (format {report['format']}{step}) against base + adapter, {proof['positions']:,} positions"
    return Table(title, ["", "measured", "allowed"], rows)


def settings(run: RunRecord) -> Section:
    """Configuration, versions and machines."""
    own = dict(run.environment)
    versions = own.pop("packages", {})
    rows = [[name, str(version)] for name, version in versions.items() if version is not None]
    rows += [
        [name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)]
        for name, value in flattened(own).items()
    ]
    parts = [
        _lines("config.yaml: all settings, with defaults", run.config),
        Table("Versions and machines of the last start", ["", "value"], rows, num_labels=2) if rows else None,
        _lines("deepspeed.json, as used", run.deepspeed),
    ]
    return section("Configuration and versions", parts)


def _lines(title: str, values: Values) -> Text | None:
    lines = [f"{name}: {value}" for name, value in flattened(values).items()]
    return Text(title, [("\n".join(lines), False)]) if lines else None
