"""What a recipe adds to the checks of a node: its settings, its data and its base."""

from qvtune.config.schema import RunConfig
from qvtune.distributed.allocation import Allocation
from qvtune.doctor.findings import NOT_COMPARED, RECIPE, Finding
from qvtune.doctor.needs import Needs, needs_of
from qvtune.doctor.software import base_fact, data_facts
from qvtune.errors import UserError, naming_setting
from qvtune.model.attention import choose_dtype
from qvtune.model.source import cached_model_folder, download_command
from qvtune.storage.paths import cache_dir
from qvtune.train.preflight import find_problems


def check_recipe(allocation: Allocation, run: RunConfig) -> tuple[Needs | None, list[Finding], dict[str, str]]:
    """Needs of the run (None if unknown), findings, and facts that must be equal on all nodes.

    The problems are those that training would refuse to start with; nothing is downloaded, converted or tokenized.
    """
    facts, findings = data_facts(run)
    problems = find_problems(run, allocation.world_size)
    needs = None
    try:
        needs, base_findings, base_facts = _check_base(run, allocation.world_size)
    except UserError as error:
        problems += [problem for problem in error.problems if problem not in problems]
        base_findings, base_facts = [], {"base": "not usable"}
    remedy = "correct the recipe or what it names, where this node sees it; all settings: launch/README.md"
    of_recipe = [Finding(RECIPE, "fail", problem, remedy) for problem in problems]
    if not problems:
        of_recipe = [Finding(RECIPE, "ok", f"can run on {allocation.world_size} ranks")]
    return needs, [*findings, *base_findings, *of_recipe], facts | base_facts


def _check_base(run: RunConfig, world_size: int) -> tuple[Needs | None, list[Finding], dict[str, str]]:
    name = run.model.name_or_path
    with naming_setting("model.name_or_path"):
        folder = cached_model_folder(name, cache_dir(), run.model.revision)
    if folder is None:
        return None, [_not_cached(name, run.model.revision)], {"base": NOT_COMPARED}
    dtype, _ = choose_dtype(run.model.dtype)
    needs, weights = needs_of(run, folder, world_size, dtype)
    total = sum(tensor.num_bytes for tensor in weights.values())
    detail = f"{folder}: {len(weights)} tensors, {total / 1e9:.2f} GB; {needs.base / 1e9:.3f} GB per rank when loaded"
    return needs, [Finding("base", "ok", detail)], base_fact(weights)


def _not_cached(name: str, revision: str | None) -> Finding:
    """The base is not on this node yet: training would fetch it, unless it may not."""
    if name == "demo":
        detail = f"demo: not in the cache yet ({cache_dir()}); not checked"
        return Finding("base", "note", detail, "the first run converts it, which takes half a minute")
    from huggingface_hub import constants

    detail = f"{name}: not in the hub's cache yet ({constants.HF_HUB_CACHE}); not checked"
    remedy = f"`{download_command(name, revision)}` where there is a network, with the HF_HOME of this node"
    if constants.HF_HUB_OFFLINE:
        return Finding("base", "fail", f"{detail}, and HF_HUB_OFFLINE is set", remedy)
    return Finding("base", "note", detail, f"training would download it; or {remedy}")
