"""What is shown to the person who typed the command, as opposed to a defect of the program."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

Value = TypeVar("Value")

HUNG_EXIT_CODE = 76  # a rank hung, and all were ended; see qvtune/distributed/hang.py


class UserError(Exception):
    """Something a person can put right: shown without a traceback, exit code 2.

    ``problems`` are complete sentences that say what was found, what is allowed and where to change it;
    all problems of one kind are reported together. ``setting`` (``data.train``, ``--output``) is where the person wrote
    what led to them: each problem starts with it. Code that does not know it leaves it out, see ``naming_setting``.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str], setting: str | None = None) -> None:
        found = (problems,) if isinstance(problems, str) else tuple(problems)
        self.setting = setting
        self.problems: tuple[str, ...] = found if setting is None else tuple(f"{setting}: {one}" for one in found)
        super().__init__("\n".join(self.problems))


@contextmanager
def naming_setting(setting: str) -> Iterator[None]:
    """Inside the block, a UserError that names no setting is raised as one that names this one."""
    try:
        yield
    except UserError as error:
        if error.setting is not None:
            raise
        raise type(error)(error.problems, setting) from error


@dataclass
class Problems:
    """What several checks have found, so that a person sees all of it at once."""

    found: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[[], Value]) -> Value | None:
        """What ``check`` returns; None where it raises a UserError, whose problems are kept."""
        try:
            return check()
        except UserError as error:
            self.found += [problem for problem in error.problems if problem not in self.found]
            return None

    def raise_all(self) -> None:
        """Raises UserError with everything that was found, if anything was."""
        if self.found:
            raise UserError(self.found)


class ProofError(UserError):
    """What was written does not compute what base and adapter compute."""

    exit_code = 1


class StopRequested(Exception):  # no error: what was asked for
    """The run was asked to stop; raised on all ranks at the same place, so that they save and leave together."""

    exit_code = 75
