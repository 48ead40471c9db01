"""Versions of packages, and digests of what must be the same on all nodes: code, data and base."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qvtune import versions
from qvtune.config.schema import RunConfig
from qvtune.doctor.findings import Finding
from qvtune.errors import UserError
from qvtune.storage.safetensors import TensorFiles
from qvtune.versions import repository

# Combinations that install and start, but fail or compute wrongly later: package -> versions, and the reason.
KNOWN_BAD: tuple[tuple[Mapping[str, str], str], ...] = (
    (
        {"deepspeed": "<0.19.8", "torch": ">=2.10"},
        "parameter groups that DeepSpeed drops make torch's scheduler fail, or give other groups their rates "
        "(OpenRLHF #1225)",
    ),
    (
        {"deepspeed": "<0.19.8", "transformers": ">=5"},
        "activation checkpointing fails on frozen parameters under ZeRO-3 (DeepSpeed #8148)",
    ),
    ({"bitsandbytes": "<0.50"}, "NF4 does not run on CPUs, and its codes differ from those that were tested"),
)
_WHOLE_BYTES = 1 << 28  # up to this size a whole file is hashed, which takes 0.3 s
_SAMPLES = 64


def check_versions(installed: Mapping[str, str | None], requires: Iterable[str]) -> list[Finding]:
    """Compare versions with the requirements of qvtune, and with combinations known to be bad."""
    problems = []
    for line in requires:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            found = versions.version(needed.name) if needed.name not in installed else installed[needed.name]
            if found is None or not needed.specifier.contains(found, prereleases=True):
                problems.append(f"{needed.name} {found or 'is missing'}, needed {needed.specifier or 'any'}")
    for combination, reason in KNOWN_BAD:
        found_here = {name: installed.get(name) for name in combination}
        if all(found and SpecifierSet(combination[name]).contains(found) for name, found in found_here.items()):
            shown = " with ".join(f"{name} {found}" for name, found in found_here.items())
            problems.append(f"{shown}: {reason}")
    remedy = "make env installs the versions of requirements.lock; all nodes must use that environment"
    if problems:
        return [Finding("versions", "fail", problem, remedy) for problem in problems]
    shown = ", ".join(f"{name} {installed[name]}" for name in ("torch", "deepspeed", "transformers"))
    return [Finding("versions", "ok", f"{shown}, Python {platform.python_version()}")]


def requirements() -> list[str]:
    """The requirements of the installed qvtune."""
    return importlib.metadata.requires("qvtune") or []


def version_facts() -> dict[str, str]:
    """Versions that must be the same on all nodes."""
    return {
        "python": platform.python_version(),
        **{name: found or "not installed" for name, found in versions.installed().items()},
    }


def code_fact() -> dict[str, str]:
    """A digest of all Python and JSON files that the run executes or reads."""
    root = repository()
    files = sorted(
        path for folder in ("src", "launch", "ds_configs") for path in (root / folder).rglob("*.*") if _is_code(path)
    )
    return {"code": _digest(f"{path.relative_to(root)} {path.read_bytes()!r}".encode() for path in files)}


def _is_code(path: Path) -> bool:
    return path.suffix in (".py", ".json", ".yaml") and "__pycache__" not in path.parts


def data_facts(config: RunConfig) -> tuple[dict[str, str], list[Finding]]:
    """Size and digest of the files of each data set; above 256 MiB the digest covers 64 blocks spread over a file.

    A file that cannot be read gives a fact only: ``preflight.find_problems`` reports it.
    """
    from qvtune.data.sources.source import open_source
    from qvtune.train.data import data_sets

    facts, findings = {}, []
    for setting, sources in data_sets(config).items():
        names = ", ".join(source.path for source in sources)
        try:
            files = [file for source in sources if source.path != "demo" for file in open_source(source).files]
            size = sum(file.stat().st_size for file in files)
            digest = _digest(block for file in files for block in _blocks(file))
        except UserError as error:
            facts[setting] = f"not readable: {error}"
        except OSError as error:
            facts[setting] = f"not readable: {names}: {error.strerror}"
        else:
            if files:
                facts[setting] = f"{size} bytes {digest}"
                findings.append(Finding("data", "ok", f"{setting}: {names}, {size / 1e6:.1f} MB"))
    return facts, findings


def base_fact(weights: TensorFiles) -> dict[str, str]:
    """A digest of config.json, of every tensor's name, offset, shape and dtype, and of the files' sizes.

    In the hub's cache the folder is named after the commit, which is part of the fact.
    """
    tensors = (f"{t.name} {t.file.name} {t.offset} {t.num_bytes} {t.shape} {t.dtype}" for t in weights.values())
    files = sorted({tensor.file for tensor in weights.values()})
    sizes = (f"{file.name} {file.stat().st_size}" for file in files)
    config = (weights.folder / "config.json").read_bytes()
    digest = _digest([config, *(line.encode() for line in (*sorted(tensors), *sizes))])
    return {"base": f"{digest} commit {weights.folder.name}" if weights.folder.parent.name == "snapshots" else digest}


def _blocks(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    block = size if size <= _WHOLE_BYTES else _WHOLE_BYTES // _SAMPLES
    with path.open("rb") as file:
        for start in range(0, size, max(block, size // _SAMPLES)):
            file.seek(start)
            yield file.read(block)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
