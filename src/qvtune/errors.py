"""What is shown to the person who typed the command, as opposed to a defect of the program."""

from collections.abc import Sequence


class UserError(Exception):
    """Something a person can put right: shown without a traceback, exit code 2.

    ``problems`` are complete sentences that say what was found, what is allowed and where to change it;
    all problems of one kind are reported together.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ProofError(UserError):
    """What was written does not compute what base and adapter compute."""

    exit_code = 1


class StopRequested(Exception):  # no error: what was asked for
    """The run was asked to stop; raised on all ranks at the same place, so that they save and leave together."""

    exit_code = 75
