"""What a run records: metrics.jsonl, and eval_rows.jsonl with the results of each document."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qvtune.checkpoint.owner import Owner
from qvtune.config.schema import RunConfig
from qvtune.distributed import process_group
from qvtune.report.followers import followers
from qvtune.report.json_lines import JsonLines
from qvtune.report.metrics import MetricsLog
from qvtune.train.prepare import Run
from qvtune.train.run_folder import refused_by_the_disk

EVAL_ROWS_FILE = "eval_rows.jsonl"
Record = Callable[..., None]  # event, fields -> metrics.jsonl


@contextmanager
def recorder(run: Run, config: RunConfig) -> Iterator[Record]:
    """The function that writes an event to metrics.jsonl, which others follow; it does nothing on ranks but 0.

    The event "eval_rows" goes to eval_rows.jsonl. Writing raises RunFolderLostError when another run has taken the run
    folder; where the two files cannot be opened all ranks raise UserError.
    """
    owner, files = run.owner, None
    with process_group.raise_on_all_ranks(), refused_by_the_disk(config):
        if owner is not None:
            files = _open(run, config, owner)
    if owner is None or files is None:
        yield lambda event, **fields: None
        return
    metrics, eval_rows = files

    def record(event: str, **fields: object) -> None:
        with owner.writing():
            if event == "eval_rows":
                assert eval_rows is not None
                eval_rows.write(fields)
            else:
                metrics.write(event, **fields)

    with followers(run.run_dir, config.report):
        try:
            yield record
        finally:
            metrics.close()
            if eval_rows is not None:
                eval_rows.close()


def _open(run: Run, config: RunConfig, owner: Owner) -> tuple[MetricsLog, JsonLines | None]:
    """metrics.jsonl and, where there is one, eval_rows.jsonl, in which evaluations stay that are in the checkpoint."""
    eval_rows, path = None, run.run_dir / EVAL_ROWS_FILE
    with owner.writing() as workspace:
        metrics = MetricsLog(run.run_dir, workspace)
        if config.train.eval_rows or path.exists():
            eval_rows = JsonLines(path, workspace, lambda entry: entry["step"] in run.state.evaluations)
    return metrics, eval_rows
