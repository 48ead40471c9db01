"""The model card of a merged model: README.md with the front matter that the hub reads."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from qvtune.convert.conversion import Conversion
from qvtune.convert.report import MergeReport

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(report: MergeReport, conversion: Conversion, title: str, how_to: Mapping[str, str]) -> str:
    """Front matter and one section each for base, data, method, losses, proof, versions, and ``how_to`` use it."""
    sections = {
        "Base": _base(report, conversion),
        "Data": _data(conversion),
        "Method": _method(report, conversion),
        "Losses": _losses(report, conversion),
        "Proof": _proof(report),
        "Versions": _bullets(f"{name} {version}" for name, version in report.versions.items()),
        **{f"How to {use}": text for use, text in how_to.items()},
    }
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items())
    return f"---\n{yaml.safe_dump(_front_matter(report, conversion), sort_keys=False)}---\n\n# {title}\n\n{body}\n"


def _front_matter(report: MergeReport, conversion: Conversion) -> dict[str, Any]:
    """``base_model`` only where the hub can find it; the licence is that of the base, where its own card names one."""
    library = {"adapter": "peft", "gguf": "gguf"}.get(report.format, "transformers")
    matter: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": _pipeline(conversion),
        "tags": _tags(report, conversion),
    }
    base = conversion.model.name_or_path
    if _HUB_ID.fullmatch(base) and not Path(base).exists():
        matter = {"base_model": base} | matter
    of_base = _front_matter_of(conversion.base.folder / "README.md")
    return matter | {key: of_base[key] for key in ("license", "license_name", "license_link") if key in of_base}


def _front_matter_of(card: Path) -> Mapping[str, Any]:
    """What a model card says about itself; nothing where there is no card, or none that can be read."""
    if not card.is_file():
        return {}
    found = re.match(r"---\s*\n(.*?)\n---\s*\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        matter = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        matter = None
    return matter if isinstance(matter, dict) else {}


def _pipeline(conversion: Conversion) -> str:
    return "text-classification" if conversion.is_classifier else "text-generation"


def _tags(report: MergeReport, conversion: Conversion) -> list[str]:
    method = (conversion.adapter.peft_config or {}).get("peft_type")
    return ["qvtune", report.format, *([str(method).lower()] if method else [])]


def _base(report: MergeReport, conversion: Conversion) -> str:
    weights = {
        "dequantized": "the NF4 values that the adapter was trained against, dequantized",
        "original": "the original ones",
    }
    return _bullets(
        [
            f"model: {report.base}",
            f"weights under the adapter: {weights[report.base_weights]}",
            f"quantization in training: {report.trained_on}",
            f"dtype of the computed matrices: {report.dtype}",
            *_if_any("fingerprint: checked, tensor by tensor", conversion.source.fingerprint),
        ]
    )


def _data(conversion: Conversion) -> str:
    data = _trajectory(conversion).get("data")
    if data is None:
        return "Not known: the adapter came without a record of its run."
    return _bullets(f"{name}: {value}" for name, value in data.items())


def _method(report: MergeReport, conversion: Conversion) -> str:
    trajectory, peft_config = _trajectory(conversion), conversion.adapter.peft_config or {}
    known = {
        **{name: peft_config.get(name) for name in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora")},
        "target_modules": peft_config.get("target_modules"),
        "scaling": report.scaling,
        "step": report.step,
    }
    optimizer = trajectory.get("optimizer", {})
    multipliers = dict(optimizer.get("lr_multipliers", []))
    lines = [f"{name}: {value}" for name, value in known.items() if value not in (None, False)]
    lines += [f"{name}: {value}" for name, value in optimizer.items() if name != "lr_multipliers"]
    if optimizer:
        lines.append(f"learning-rate multipliers: {multipliers or 'none'} (arXiv 2410.02247)")
    return _bullets(lines)


def _losses(report: MergeReport, conversion: Conversion) -> str:
    lines = []
    if conversion.source.state is not None:
        evaluated = sorted(conversion.source.state.evaluations.items())
        lines = [
            f"evaluation at step {step}: {', '.join(f'{name} {value:.4f}' for name, value in metrics.items())}"
            for step, metrics in evaluated
        ]
    if report.losses is not None:
        losses = report.losses
        lines += [
            f"on the {losses.label_tokens} label tokens of the proof: {losses.before:.4f} before, {losses.adapted:.4f} "
            f"adapted, {losses.merged:.4f} merged"
        ]
    return _bullets(lines) if lines else "Not known: the adapter came without evaluation rows."


def _proof(report: MergeReport) -> str:
    proof = report.proof
    lines = [
        f"{report.format} against base + adapter on {proof.positions} positions: "
        f"top-1 agreement {proof.top1_agreement:.2%}, KL {proof.mean_kl:.1e} nats, "
        f"logits differ by {proof.mean_abs_difference:.1e} on average and "
        f"{proof.max_abs_difference:.1e} at most"
    ]
    names = {"chosen": "this merge against what was trained", "other": "with the other choice of base weights"}
    lines += [
        f"{names[name]}: top-1 agreement {difference.top1_agreement:.2%}, KL {difference.mean_kl:.1e} nats"
        for name, difference in report.from_training.items()
    ]
    lines += [] if report.check is None else [report.check.summary()]
    lines += [f"warning: {warning}" for warning in report.warnings]
    return f"{_bullets(lines)}\n\nEvery number is in `merge_report.json`."


def _trajectory(conversion: Conversion) -> Mapping[str, Any]:
    return {} if conversion.source.state is None else conversion.source.state.trajectory


def _if_any(line: str, condition: object) -> list[str]:
    return [line] if condition else []


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
