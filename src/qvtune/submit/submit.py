"""Submits a run as a Slurm job: checks it as training would, copies code and configuration, calls sbatch."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qvtune import versions
from qvtune.config.deepspeed import AUTO, find_json
from qvtune.config.load import dump_config, load_config
from qvtune.config.schema import RunConfig
from qvtune.console import console
from qvtune.doctor import storage
from qvtune.doctor.findings import Finding
from qvtune.errors import Problems, UserError
from qvtune.storage.atomic import atomic_folder
from qvtune.storage.files import write_json
from qvtune.submit.batch import run_dir_of_job
from qvtune.system import heavy_imports
from qvtune.versions import repository

if TYPE_CHECKING:
    from qvtune.train.preflight import Plan

_CODE = ("launch", "src", "slurm", "ds_configs")
_NOT_CODE = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
_PROCS_PER_NODE = "QVTUNE_PROCS_PER_NODE"
_PRINT_PROCS_PER_NODE = f'source "$1" >&2; printf "%s\\n" "${{{_PROCS_PER_NODE}:-}}"'  # $1: the settings file
_SETTINGS_SECONDS = 60  # module systems on a slow file system


@dataclass(frozen=True)
class Request:
    """A run and the nodes for it.

    Attributes:
        procs_per_node: ranks per node. None: what QVTUNE_PROCS_PER_NODE says, else one per GPU.
        sbatch: further options of sbatch.
        gpu: what GPUs the nodes have, a name of ``qvtune.plan.gpus.GPUS``; shows what the run will need and take.
    """

    config: Path
    overrides: Sequence[str]
    nodes: int
    gpus_per_node: int
    procs_per_node: int | None = None
    partition: str | None = None
    time: str | None = None
    sbatch: Sequence[str] = ()
    dry_run: bool = False
    gpu: str | None = None

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks on each node."""
        return self.procs_per_node or self.gpus_per_node

    @property
    def world_size(self) -> int:
        """Number of ranks of the run."""
        return self.nodes * self.ranks_per_node

    @property
    def on_gpus(self) -> bool:
        """Whether there is one rank per GPU; else all ranks run on CPUs."""
        return self.gpus_per_node > 0 and self.procs_per_node in (None, self.gpus_per_node)


def submit(request: Request) -> None:
    """Check and submit a run; with ``dry_run`` show the command and write nothing.

    The job runs a copy of code and configuration in ``run_dir/submitted/TIME``, so later edits do not affect it. Data
    and base are not copied.

    Raises UserError with all problems; the run folder is then unchanged.
    """
    problems = Problems()
    request = problems.attempt(lambda: _as_in_the_job(request)) or request
    problems.found += _request_problems(request)
    run = problems.attempt(lambda: load_config(request.config, request.overrides))
    problems.attempt(lambda: run_dir_of_job(request.config, request.overrides))
    if run is not None:
        with heavy_imports():
            from qvtune.train.preflight import preflight  # torch and transformers: seconds
        world_size = max(1, request.world_size)
        per_node = max(1, request.ranks_per_node)
        plan = problems.attempt(lambda: preflight(run, world_size, on_gpus=request.on_gpus, ranks_per_node=per_node))
        problems.attempt(lambda: _check_this_machine(run, world_size, plan))
    problems.raise_all()
    assert run is not None
    run_dir = Path(run.run_dir).absolute()
    frozen = new_name(run_dir / "submitted")
    command = _command(request, frozen)
    out = console()
    for line in _estimates(run, request):
        out.print(line, markup=False, soft_wrap=True)
    out.print(shlex.join(command), markup=False, soft_wrap=True)
    if request.dry_run:
        out.print("not submitted: --dry-run", markup=False)
        return
    with all_or_nothing(frozen):
        freeze(run, frozen, request, command)
        job = _sbatch(command, request, frozen)
    for line in _what_now(job, run_dir):
        out.print(line, markup=False, soft_wrap=True)


def _request_problems(request: Request) -> list[str]:
    """Problems of the command line and of this machine, not of the recipe."""
    problems = []
    if request.nodes < 1 or request.gpus_per_node < 0 or request.world_size < 1:
        problems.append("--nodes must be at least 1, and --gpus-per-node too, or else --procs-per-node")
    if request.gpu is not None and not request.on_gpus:
        problems.append(f"--gpu {request.gpu}: all ranks run on CPUs; give --gpus-per-node, or leave it out")
    return problems + sbatch_problems(request.sbatch, dry_run=request.dry_run)


def sbatch_problems(options: Sequence[str], *, dry_run: bool = False) -> list[str]:
    """What is wrong with options of sbatch, and with this machine unless it is a ``dry_run``."""
    problems = []
    for option in options:
        if not option.startswith("-"):
            problems.append(f"--sbatch={option}: not an option of sbatch; write --sbatch=--name=value")
        elif option.startswith("--export"):
            problems.append(f"--sbatch={option}: the job needs the variables of this command; use slurm/cluster.env")
    if "SBATCH_EXPORT" in os.environ:
        problems.append("SBATCH_EXPORT is set: the job needs the variables of this command; unset it")
    if not dry_run and shutil.which("sbatch") is None:
        problems.append("sbatch is not on PATH: submit from a login node of the cluster, or use --dry-run")
    if not dry_run and not _settings_file().is_file():
        problems.append(
            f"{_settings_file()} does not exist: cp slurm/cluster.env.example slurm/cluster.env, and edit it"
        )
    return problems


def _estimates(run: RunConfig, request: Request) -> list[str]:
    """Memory, time and gathers, where ``--gpu`` says on what."""
    if request.gpu is None:
        return []
    from qvtune.plan import plan  # as preflight

    return plan.short_plan(run, plan.Request(request.nodes, request.gpus_per_node, request.gpu))


def _settings_file() -> Path:
    return Path(os.environ.get("QVTUNE_CLUSTER_ENV") or repository() / "slurm" / "cluster.env")


def _as_in_the_job(request: Request) -> Request:
    """The request with the ranks per node that the job will start: cluster.env may set QVTUNE_PROCS_PER_NODE.

    Bash evaluates the file here as it does in the job, since the value may depend on other lines and on variables of
    this shell. The file's name is an argument, never part of the command.

    Raises UserError if the file cannot be evaluated, or if it overrides ``--procs-per-node``.
    """
    environment, settings = _job_environment(request), _settings_file()
    value = environment.get(_PROCS_PER_NODE, "")
    if settings.is_file():
        command = ["bash", "--noprofile", "--norc", "-c", _PRINT_PROCS_PER_NODE, "bash", str(settings)]
        options = {"env": environment, "stdin": subprocess.DEVNULL, "text": True, "timeout": _SETTINGS_SECONDS}
        try:
            done = subprocess.run(command, capture_output=True, check=False, **options)  # type: ignore[call-overload]
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{settings}: bash has not finished reading it after {_SETTINGS_SECONDS} s") from error
        if not done.stdout.endswith("\n"):  # the file has called `exit`
            raise UserError(f"{settings}: it ended bash with exit code {done.returncode}: {done.stderr.strip()}")
        value = done.stdout.strip()
    if value and (not value.isdecimal() or int(value) == 0):
        raise UserError(f"{_PROCS_PER_NODE} ({settings} or this shell): {value!r} is not a number of ranks per node")
    found = int(value) if value else None
    if request.procs_per_node is not None and found != request.procs_per_node:
        raise UserError(
            f"--procs-per-node {request.procs_per_node}: {settings} sets {_PROCS_PER_NODE} to {value or 'nothing'}, "
            "which the job would use; change or remove one of them"
        )
    return replace(request, procs_per_node=found)


def _check_this_machine(run: RunConfig, world_size: int, plan: "Plan | None") -> None:
    """The doctor's checks that a login node can make; ``plan`` is None if the run has problems.

    Raises UserError with those that failed.
    """
    from qvtune.doctor.needs import needs_of
    from qvtune.doctor.software import check_versions, requirements

    checkpoint = 0 if plan is None else needs_of(run, plan.folder, world_size, plan.dtype)[0].checkpoint
    probes = storage.probe_folder(Path(run.run_dir), f"submit-{os.getpid()}")
    try:
        on_disk, _ = storage.check_storage(probes, 0, checkpoint, run.checkpoint.keep)
    finally:
        storage.remove_probes(probes)
    findings: list[Finding] = check_versions(versions.installed(), requirements()) + on_disk
    for finding in findings:
        console().print(f"{finding.status:4}  {finding.check}: {finding.detail}", markup=False, soft_wrap=True)
    failed = [f"{one.check}: {one.detail}; {one.remedy}" for one in findings if one.status == "fail"]
    if failed:
        raise UserError(failed)


def new_name(folder: Path) -> Path:
    """A path in ``folder`` that is not taken, named after the time."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = [stamp, *(f"{stamp}-{number}" for number in range(1, 1000))]
    return next(folder / name for name in names if not (folder / name).exists())


@contextmanager
def all_or_nothing(path: Path) -> Iterator[None]:
    """If the block fails, remove ``path`` and the parent folders that were made for it."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        if new[-1].exists():
            shutil.rmtree(new[-1])
        raise


def freeze(run: RunConfig, frozen: Path, request: Request, command: Sequence[str]) -> None:
    """Copy code, configuration and DeepSpeed JSON into a new folder ``frozen``, with a record of commit and command.

    ``deepspeed: auto`` stays: the job chooses among the copies of ds_configs/.
    """
    with atomic_folder(frozen) as private:
        copy_code(private)
        if run.deepspeed != AUTO:
            shutil.copyfile(find_json(run.deepspeed), private / "deepspeed.json")
            run = run.model_copy(update={"deepspeed": str(frozen / "deepspeed.json")})
        (private / "config.yaml").write_text(dump_config(run), encoding="utf-8")
        record = {"recipe": str(request.config), "overrides": list(request.overrides), "command": list(command)}
        write_json(private / "submission.json", {**record, "folder": os.getcwd(), "commit": versions.commit()})


def copy_code(folder: Path) -> None:
    """Copy what a job runs, with the commit, into a folder."""
    for name in _CODE:
        shutil.copytree(repository() / name, folder / name, ignore=_NOT_CODE)
    (folder / versions.COMMIT_FILE).write_text(f"{versions.commit() or ''}\n", encoding="utf-8")


def _command(request: Request, frozen: Path) -> list[str]:
    """The sbatch command, one word per argument; no shell interprets it."""
    options = [f"--nodes={request.nodes}"]
    options += [f"--gpus-per-node={request.gpus_per_node}"] if request.gpus_per_node else []
    options += [f"--partition={request.partition}"] if request.partition else []
    options += [f"--time={request.time}"] if request.time else []
    script, recipe = frozen / "slurm" / "train.sbatch", frozen / "config.yaml"
    return ["sbatch", "--parsable", *options, *request.sbatch, str(script), str(recipe)]


def _sbatch(command: Sequence[str], request: Request, frozen: Path) -> str:
    """Submit and return the job id. Raises UserError with the message of sbatch."""
    return call_sbatch(command, {**_job_environment(request), "QVTUNE_HOME": str(frozen)})


def call_sbatch(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Call sbatch --parsable; returns the job's id. Raises UserError with the message of sbatch."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(done.stderr.strip() or f"sbatch: exit code {done.returncode}")
    sys.stderr.write(done.stderr)
    return done.stdout.strip().splitlines()[-1].partition(";")[0]  # ID, or ID;CLUSTER


def _job_environment(request: Request) -> dict[str, str]:
    """The variables with which the job starts, before it sources cluster.env."""
    procs = {} if request.procs_per_node is None else {_PROCS_PER_NODE: str(request.procs_per_node)}
    return {**os.environ, **procs}


def _what_now(job: str, run_dir: Path) -> list[str]:
    """Commands that follow, save, stop and resume the job."""
    again = shlex.join(["python", *sys.argv])
    return [
        f"job {job}",
        f"  follow   tail -F {shlex.quote(_output(job))}    (each rank's output: {shlex.quote(str(run_dir / 'logs'))})",
        f"  save     scancel --batch --signal=USR1 {job}    (a checkpoint now; the job is requeued and resumes)",
        f"  stop     scancel {job}    (saves as well, if that takes less than Slurm's KillWait)",
        f"  resume   {again}    (once it has ended; resumes from the newest checkpoint)",
    ]


def _output(job: str) -> str:
    """The job's output file, according to Slurm."""
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False).stdout
    paths = [line.partition("=")[2] for line in shown.splitlines() if line.strip().startswith("StdOut=")]
    return paths[0] if paths else f"slurm-{job}.out"
