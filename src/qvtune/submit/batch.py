"""Helper of slurm/train.sbatch and slurm/node.sh: ``python -m qvtune.submit.batch prepare|lost|hung|finished ...``.

Imports nothing that takes seconds.
"""

import json
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qvtune.config.load import load_config
from qvtune.distributed.hang_reports import hung_twice, verdict_of
from qvtune.distributed.ports import free_port_of_job
from qvtune.errors import UserError


def run_dir_of_job(recipe: Path, overrides: Sequence[str]) -> Path:
    """The absolute run folder of a recipe that may be requeued.

    Raises UserError for problems of the configuration, and if ``checkpoint.resume`` is ``never`` or
    ``train.stop_after_step`` is set.
    """
    config = load_config(recipe, overrides)
    problems = []
    if config.checkpoint.resume == "never":
        problems.append(
            f"checkpoint.resume: never; a requeued job would start from scratch each time ({recipe}). Add "
            "checkpoint.resume=if_available, and for a new run another run_dir=..."
        )
    if config.train.stop_after_step is not None:
        problems.append(
            f"train.stop_after_step: {config.train.stop_after_step}; the job would requeue itself and stop there each "
            f"time ({recipe}). Add train.stop_after_step=null; at the time limit the job requeues itself anyway"
        )
    if problems:
        raise UserError(problems)
    return Path(config.run_dir).absolute()


def lost_hosts(hosts: Iterable[str], port: int, seconds: float = 10.0) -> list[str]:
    """The hosts that do not answer within ``seconds``; a refused connection on ``port`` is an answer."""
    names = list(hosts)
    with ThreadPoolExecutor(max_workers=min(64, len(names))) as pool:
        answers = list(pool.map(lambda host: _answers(host, port, seconds), names))
    return [host for host, answered in zip(names, answers, strict=True) if not answered]


def _answers(host: str, port: int, seconds: float) -> bool:
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # no route, no such name, silence
        return False
    return True


def has_finished(run_dir: Path) -> bool:
    """Whether the last event in metrics.jsonl is that the run is complete.

    The exit code is not enough: slurm/node.sh returns 0 in a start that Slurm has replaced by another one.
    """
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    last = json.loads(lines[-1]) if lines else {}
    return last.get("event") == "run_end" and last["reason"] == "completed"


def hang_of_start(run_dir: Path, job: str, restart: int) -> str:
    """Where a rank has hung in this start of a job: the hosts that did so in two starts or more, then the message.

    Empty where none has; the hosts are on the first line, separated by commas.
    """
    logs = run_dir / "logs"
    verdict = verdict_of(logs, job, restart)
    return "" if verdict is None else f"{','.join(hung_twice(logs, job))}\n{verdict['message']}"


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code.

    ``prepare RECIPE [overrides]`` prints a free port and the run folder, ``lost PORT HOST ...`` the lost hosts,
    ``hung RUN_DIR`` what ``hang_of_start`` says of this start; ``finished RUN_DIR`` returns 0 or 1.
    """
    command, first, *rest = arguments
    if command == "finished":
        return 0 if has_finished(Path(first)) else 1
    if command == "hung":
        restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        sys.stdout.write(hang_of_start(Path(first), os.environ["SLURM_JOB_ID"], restart))
        return 0
    if command == "lost":
        sys.stdout.write(" ".join(lost_hosts(rest, int(first))))
        return 0
    assert command == "prepare", command
    try:
        run_dir = run_dir_of_job(Path(first), rest)
    except UserError as error:
        sys.stderr.writelines(f"error: {problem}\n" for problem in error.problems)
        return error.exit_code
    sys.stdout.write(f"{free_port_of_job(int(os.environ['SLURM_JOB_ID']))}\n{run_dir}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
