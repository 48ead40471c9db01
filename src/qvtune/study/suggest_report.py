"""The verdict of a search in words, as a file, as settings, and as a picture."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qvtune.config.load import dump_config
from qvtune.config.schema import RunConfig
from qvtune.storage.atomic import atomic_file
from qvtune.study.search import FULL, NARROW, WIDE, Outcome, Rates, Search, candidates, model_of
from qvtune.study.suggest import rate_settings
from qvtune.study.surface import means
from qvtune.study.verdict import Verdict

Results = Mapping[str, Outcome]


def sentences(verdict: Verdict, search: Search, results: Results) -> list[str]:
    """The verdict, what is behind it, and what it has cost."""
    until_then = [] if verdict.rates else [f"Until then the better of the two: {_rates(verdict.suggested)}."]
    return [_first(verdict), *until_then, *_reasons(verdict), *_balance(verdict, search), _cost(search, results)]


def _first(verdict: Verdict) -> str:
    if verdict.kind == "recommended":
        assert verdict.rates is not None
        return f"recommended: {_rates(verdict.rates)}"
    if verdict.kind == "no difference":
        return f"no difference: use lambda = 1 at eta = {verdict.equal.v:.3g}"
    if verdict.kind == "not decided":
        return (
            f"not decided: needs {verdict.more_seeds} more seeds of each of the two best settings (a larger --budget)"
        )
    return f"edge of the box: widen (--low, --high): {'; '.join(verdict.edges)}"


def _rates(rates: Rates) -> str:
    return f"eta_QK = {rates.qk:.3g}, eta_V = {rates.v:.3g} (lambda = {rates.ratio:.3g})"


def _reasons(verdict: Verdict) -> list[str]:
    found, loss = verdict.comparison, verdict.loss
    return [
        f"Best with lambda = 1: eta = {verdict.equal.v:.3g}, loss {loss:.4f}. Best with another lambda: "
        f"{_rates(verdict.other)}. Its loss differs by {found.difference:+.4f} ({found.difference / loss:+.2%}), 95 % "
        f"interval {found.low:+.4f} to {found.high:+.4f}: {found.num_rows} rows, {found.num_seeds} seeds.",
        f"A difference below {verdict.margin:.4f} ({verdict.margin / loss:.1%} of the loss) counts as none (--margin).",
        f"By a model of all runs lambda = {verdict.best_lambda:.3g} is the best, 95 % interval "
        f"{verdict.lambda_low:.3g} to {verdict.lambda_high:.3g}.",
    ]


def _balance(verdict: Verdict, search: Search) -> list[str]:
    if search.balance is None:
        return []
    place = "in" if verdict.lambda_low <= search.balance <= verdict.lambda_high else "not in"
    factor = max(search.balance / verdict.best_lambda, verdict.best_lambda / search.balance)
    return [
        "Balance point, at which the first updates of q and k and those of v change the attention's output equally: "
        f"lambda = {search.balance:.3g}; {place} the interval, a factor of {factor:.2g} from the best."
    ]


def _cost(search: Search, results: Results) -> str:
    steps = sum(int(name.split("steps")[1].split(",")[0]) for name in results)
    failed = sum(one.failed is not None for one in results.values())
    of_them = f"; {failed} of them failed, as runs at too high rates do" if failed else ""
    runs = f"{steps / search.steps:.1f} runs of {search.steps}"
    return f"Cost: {len(results)} runs with {steps:,} optimizer steps, as many as {runs}{of_them}."


def write(folder: Path, verdict: Verdict, search: Search, results: Results, run: RunConfig) -> list[str]:
    """Write ``verdict.json``, ``search.svg`` and ``suggestion.yaml``.

    Returns what is in them as sentences. The same results give the same bytes.
    """
    said = sentences(verdict, search, results)
    content = {
        "verdict": verdict.kind,
        **_rounded(asdict(verdict)),
        "suggested": list(verdict.suggested),
        "sentences": said,
    }
    with atomic_file(folder / "verdict.json") as private:
        private.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _draw(folder / "search.svg", verdict, search, results)
    suggestion = folder / "suggestion.yaml"
    with atomic_file(suggestion) as private:
        private.write_text(_recipe(verdict.suggested, run, said), encoding="utf-8")
    return [*said, f"python launch/train.py --config {suggestion}"]


def _rounded(value: Any) -> Any:
    """Six significant digits: what is beyond may differ between machines."""
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _recipe(rates: Rates, run: RunConfig, said: list[str]) -> str:
    """The recipe with these rates, under the verdict as a comment."""
    tree = yaml.safe_load(dump_config(run))
    for key, value in rate_settings(rates, run).items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    comment = "".join(f"# {line}\n" for line in said)
    return comment + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _draw(path: Path, verdict: Verdict, search: Search, results: Results) -> None:
    """The model's loss over both rates with all runs; and over lambda, each at its best rates."""
    import matplotlib
    from matplotlib.figure import Figure

    model = model_of(search, results, (WIDE, NARROW, FULL))
    axis = np.geomspace(*search.ends, 33)
    surface = means(model, [(qk, v) for v in axis for qk in axis]).reshape(33, 33)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    filled = left.contourf(axis, axis, surface, levels=20, cmap="viridis_r")
    figure.colorbar(filled, ax=left, label="expected loss, nats per label token")
    left.plot(axis, axis, "--", color="black", linewidth=1, label="lambda = 1")
    runs = {(name.split(",steps")[0]) for name in results}
    points = np.array([[float(part.lstrip("qkv")) for part in name.split(",")] for name in sorted(runs)])
    left.plot(points[:, 0], points[:, 1], ".", color="white", markeredgecolor="black", label="runs")
    for rates, mark, what in ((verdict.equal, "s", "best with lambda = 1"), (verdict.other, "*", "best with another")):
        left.plot(*rates, mark, color="red", markeredgecolor="black", markersize=11, label=what)
    left.set(xscale="log", yscale="log", xlabel="eta_QK", ylabel="eta_V")
    left.legend(fontsize=7, loc="lower left")
    _draw_profile(right, model, search, verdict)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "search"}), atomic_file(path) as private:
        figure.savefig(private, format="svg", metadata={"Date": None})


def _draw_profile(plot: Any, model: Any, search: Search, verdict: Verdict) -> None:
    """Expected loss over lambda, each at its best rates; the interval of the best lambda is shaded."""
    line, others = candidates(search)
    everywhere = [*line, *others]
    best: dict[float, float] = {}
    for rates, loss in zip(everywhere, means(model, everywhere), strict=True):
        ratio = float(f"{rates.ratio:.3g}")
        best[ratio] = min(best.get(ratio, np.inf), float(loss))
    ratios = sorted(best)
    plot.plot(ratios, [best[ratio] for ratio in ratios], color="#1f77b4")
    plot.axvspan(verdict.lambda_low, verdict.lambda_high, alpha=0.15, label="95 % interval of the best lambda")
    plot.axvline(1.0, color="black", linestyle="--", linewidth=1)
    if search.balance is not None:
        plot.axvline(search.balance, color="#d62728", linewidth=1, label="balance point")
    plot.set(xscale="log", xlabel="lambda = eta_V / eta_QK", ylabel="expected loss at the best rates")
    plot.legend(fontsize=7)
