"""The matrix: kind of fault x phase."""

from collections.abc import Sequence

from rich.table import Table

from qvtune.console import console
from tests.faults.cycle import Outcome


def show(outcomes: Sequence[Outcome], seed: int) -> None:
    """Print a row for each kind and phase, and one for all."""
    table = Table(title=f"{len(outcomes)} cycles, seed {seed}", title_justify="left")
    for heading in ("fault", "phase", "cycles", "struck", "exact", "lost or repeated steps", "damaged folders"):
        table.add_column(heading, justify="left" if heading in ("fault", "phase") else "right")
    cells = sorted({(one.fault.kind, one.fault.phase) for one in outcomes})
    for kind, phase in cells:
        table.add_row(kind, phase, *_numbers([o for o in outcomes if (o.fault.kind, o.fault.phase) == (kind, phase)]))
    table.add_section()
    table.add_row("all", "", *_numbers(outcomes))
    console().print(table)


def _numbers(outcomes: Sequence[Outcome]) -> list[str]:
    columns = (1, "struck", "exact", "lost_steps", "damaged")
    return [str(sum(one if isinstance(one := name, int) else getattr(o, name) for o in outcomes)) for name in columns]
