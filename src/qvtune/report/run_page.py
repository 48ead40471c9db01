"""report.html of a run: one self-contained page, made from the files of the run folder alone."""

import os
import time
from pathlib import Path

from qvtune.report.data_sections import data
from qvtune.report.history import History
from qvtune.report.page import Page, as_html
from qvtune.report.result_sections import answers, merges, settings
from qvtune.report.run_record import RunRecord, duration, read_run
from qvtune.report.run_sections import losses, rates_and_norms, run_seconds, speed_and_memory
from qvtune.report.start_sections import starts_and_faults

REPORT = "report.html"
_SECTIONS = ("model", "adapter", "optimizer")


def write_report(run_dir: Path, history: History | None = None, *, is_alive: bool | None = None) -> Path:
    """Write ``run_dir/report.html`` and return its path; arguments as of ``read_run``.

    Raises UserError where the folder is none of a run, OSError where it cannot be written.
    """
    return write_page(run_page(read_run(run_dir, history, is_alive=is_alive)), run_dir / REPORT)


def write_page(page: Page, path: Path) -> Path:
    """In place of an earlier one, at once. Not forced to the disk: it can be made again at any time."""
    private = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        private.write_text(as_html(page), encoding="utf-8")
        private.replace(path)
    finally:
        private.unlink(missing_ok=True)
    return path


def run_page(run: RunRecord) -> Page:
    """All sections that the run has something for."""
    found = [
        losses(run),
        rates_and_norms(run),
        speed_and_memory(run),
        starts_and_faults(run),
        answers(run),
        merges(run),
        data(run.data),
        settings(run),
    ]
    return Page(f"Run {run.name}", _facts(run), [one for one in found if one.parts])


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    history, model, adapter, optimizer = run.history, *(run.config.get(name, {}) for name in _SECTIONS)
    multipliers = [f"{key} * {value:g}" for key, value in optimizer.get("lr_multipliers", {}).items()]
    facts = {
        "state": run.state,
        "loss": _losses(history),
        "model": f"{model['name_or_path']} ({model['quantization']})" if model else "",
        "trained": f"{adapter['method']} of {', '.join(adapter['projections'])}{_parameters(run)}" if adapter else "",
        "learning rate": ", ".join([f"{optimizer['lr']:g}", *multipliers]) if optimizer else "",
        "speed": _speed(history),
        "took": duration(run_seconds(history)) if history.starts else "",
        "folder": str(run.run_dir),
        "commit": run.environment.get("commit") or "",
        "this page": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.time)),
    }
    return [(name, text) for name, text in facts.items() if text]


def _losses(history: History) -> str:
    evaluations, steps = history.of("eval"), history.column("loss")
    if len(evaluations) > 1:
        before, after = evaluations[0]["loss"], evaluations[-1]["loss"]
        return f"{before:.4f} -> {after:.4f} nats per label token on the evaluation rows ({after / before - 1:+.1%})"
    return f"{steps[-1]:.4f} nats per label token in the last step" if len(steps) else ""


def _parameters(run: RunRecord) -> str:
    counts = run.history.starts[-1].begin.get("trained_parameters", {}) if run.history.starts else {}
    return f"; parameters: {', '.join(f'{name} {count:,}' for name, count in counts.items())}" if counts else ""


def _speed(history: History) -> str:
    tokens, seconds = history.column("tokens"), history.column("seconds").sum()
    return f"{tokens.sum() / seconds:,.0f} tokens/s over {len(tokens):,} steps" if seconds else ""
