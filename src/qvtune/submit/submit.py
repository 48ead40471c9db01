"""A run becomes a Slurm job: checked as training would, frozen, submitted."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qvtune import versions
from qvtune.config.deepspeed import find_json
from qvtune.config.load import dump_config, load_config
from qvtune.config.schema import RunConfig
from qvtune.console import console
from qvtune.doctor import storage
from qvtune.doctor.findings import Finding
from qvtune.errors import Problems, UserError
from qvtune.storage.atomic import atomic_folder
from qvtune.storage.files import write_json
from qvtune.submit.batch import run_dir_of_job
from qvtune.versions import repository

_CODE = ("launch", "src", "slurm", "ds_configs")
_NOT_CODE = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")


@dataclass(frozen=True)
class Request:
    """What to run on what. ``procs_per_node``: ranks on CPUs instead of one for each GPU; ``sbatch``: its options."""

    config: Path
    overrides: Sequence[str]
    nodes: int
    gpus_per_node: int
    procs_per_node: int | None = None
    partition: str | None = None
    time: str | None = None
    sbatch: Sequence[str] = ()
    dry_run: bool = False

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * (self.procs_per_node or self.gpus_per_node)


def submit(request: Request) -> None:
    """Check, freeze and submit a run; with ``dry_run`` show the command and write nothing.

    The job runs a copy of code and configuration in ``run_dir/submitted/TIME``: what is edited afterwards does not
    reach it. Data and base are not copied.

    Raises UserError with all that is wrong; the run folder is then as it was.
    """
    problems = Problems(_request_problems(request))
    run = problems.attempt(lambda: load_config(request.config, request.overrides))
    problems.attempt(lambda: run_dir_of_job(request.config, request.overrides))
    if run is not None:
        from qvtune.train.preflight import preflight  # imports torch and transformers: seconds

        world_size = max(1, request.world_size)
        # one rank for each GPU, or ranks on CPUs alone
        on_gpus = request.gpus_per_node > 0 and request.procs_per_node in (None, request.gpus_per_node)
        problems.attempt(lambda: preflight(run, world_size, on_gpus=on_gpus))
        problems.attempt(lambda: _check_this_machine(run, world_size, on_gpus))
    problems.raise_all()
    assert run is not None
    run_dir = Path(run.run_dir).absolute()
    frozen = _new_name(run_dir / "submitted")
    command = _command(request, frozen)
    out = console()
    out.print(shlex.join(command), markup=False, soft_wrap=True)
    if request.dry_run:
        out.print("not submitted: --dry-run", markup=False)
        return
    with _all_or_nothing(frozen):
        freeze(run, frozen, request, command)
        job = _sbatch(command, request, frozen)
    for line in _what_now(job, run_dir):
        out.print(line, markup=False, soft_wrap=True)


def _request_problems(request: Request) -> list[str]:
    """What is wrong with the command line and this machine, recipe aside."""
    problems = []
    if request.nodes < 1 or request.gpus_per_node < 0 or request.world_size < 1:
        problems.append("--nodes must be at least 1, and --gpus-per-node too, or else --procs-per-node")
    for option in request.sbatch:
        if not option.startswith("-"):
            problems.append(f"--sbatch={option}: not an option of sbatch; write --sbatch=--name=value")
        elif option.startswith("--export"):
            problems.append(f"--sbatch={option}: the job needs the variables of this command; use slurm/cluster.env")
    if "SBATCH_EXPORT" in os.environ:
        problems.append("SBATCH_EXPORT is set: the job needs the variables of this command; unset it")
    if not request.dry_run and shutil.which("sbatch") is None:
        problems.append("sbatch is not on PATH: submit from a login node of the cluster, or look with --dry-run")
    settings = Path(os.environ.get("QVTUNE_CLUSTER_ENV") or repository() / "slurm" / "cluster.env")
    if not request.dry_run and not settings.is_file():
        problems.append(f"{settings} is not there: cp slurm/cluster.env.example slurm/cluster.env, and edit it")
    return problems


def _check_this_machine(run: RunConfig, world_size: int, on_gpus: bool) -> None:
    """The doctor's checks that a login node can make. Raises UserError with what failed."""
    from qvtune.doctor.needs import needs_of, open_folder
    from qvtune.doctor.software import check_versions, requirements
    from qvtune.model.attention import choose_dtype

    weights = open_folder(run)
    dtype, _ = choose_dtype(run.model.dtype, on_gpus)
    checkpoint = 0 if weights is None else needs_of(run, weights, world_size, dtype).checkpoint
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


def _new_name(folder: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = [stamp, *(f"{stamp}-{number}" for number in range(1, 1000))]
    return next(folder / name for name in names if not (folder / name).exists())


@contextmanager
def _all_or_nothing(path: Path) -> Iterator[None]:
    """When the block fails, ``path`` and the folders that had to be made for it are taken away again."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        if new[-1].exists():
            shutil.rmtree(new[-1])
        raise


def freeze(run: RunConfig, frozen: Path, request: Request, command: Sequence[str]) -> None:
    """Copy code, configuration and DeepSpeed JSON into a new folder ``frozen``, with a record of commit and command."""
    with atomic_folder(frozen) as private:
        for name in _CODE:
            shutil.copytree(repository() / name, private / name, ignore=_NOT_CODE)
        shutil.copyfile(find_json(run.deepspeed), private / "deepspeed.json")
        as_run = run.model_copy(update={"deepspeed": str(frozen / "deepspeed.json")})
        (private / "config.yaml").write_text(dump_config(as_run), encoding="utf-8")
        (private / versions.COMMIT_FILE).write_text(f"{versions.commit() or ''}\n", encoding="utf-8")
        record = {"recipe": str(request.config), "overrides": list(request.overrides), "command": list(command)}
        write_json(private / "submission.json", {**record, "folder": os.getcwd(), "commit": versions.commit()})


def _command(request: Request, frozen: Path) -> list[str]:
    """sbatch's arguments, one word each: nothing here passes through a shell."""
    options = [f"--nodes={request.nodes}"]
    options += [f"--gpus-per-node={request.gpus_per_node}"] if request.gpus_per_node else []
    options += [f"--partition={request.partition}"] if request.partition else []
    options += [f"--time={request.time}"] if request.time else []
    script, recipe = frozen / "slurm" / "train.sbatch", frozen / "config.yaml"
    return ["sbatch", "--parsable", *options, *request.sbatch, str(script), str(recipe)]


def _sbatch(command: Sequence[str], request: Request, frozen: Path) -> str:
    """Submit; the job's id. Raises UserError with sbatch's own words."""
    environment = {**os.environ, "QVTUNE_HOME": str(frozen)}
    if request.procs_per_node:
        environment["QVTUNE_PROCS_PER_NODE"] = str(request.procs_per_node)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(done.stderr.strip() or f"sbatch: exit code {done.returncode}")
    sys.stderr.write(done.stderr)
    return done.stdout.strip().splitlines()[-1].partition(";")[0]  # ID, or ID;CLUSTER


def _what_now(job: str, run_dir: Path) -> list[str]:
    """What to type next."""
    again = shlex.join(["python", *sys.argv])
    return [
        f"job {job}",
        f"  follow   tail -F {shlex.quote(_output(job))}    (each rank's output: {shlex.quote(str(run_dir / 'logs'))})",
        f"  save     scancel --batch --signal=USR1 {job}    (a checkpoint now; the job then starts again from it)",
        f"  stop     scancel {job}    (saves as well, where that takes less than Slurm's KillWait)",
        f"  resume   {again}    (once it has ended; it goes on from the newest checkpoint)",
    ]


def _output(job: str) -> str:
    """The job's output file, as Slurm has it."""
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False).stdout
    paths = [line.partition("=")[2] for line in shown.splitlines() if line.strip().startswith("StdOut=")]
    return paths[0] if paths else f"slurm-{job}.out"
