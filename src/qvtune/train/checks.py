"""Checks that all ranks run together, so that one message has everything that any of them has found."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from qvtune.distributed import process_group
from qvtune.errors import Problems

Value = TypeVar("Value")


class Checks(Problems):
    """Checks that all ranks run in the same order; what one rank finds, all of them have found."""

    def run(self, check: Callable[[], Value]) -> Value | None:
        """What ``check`` returns; None, on all ranks, where it raises a UserError on one of them."""
        return self.attempt(partial(_on_all_ranks, check))

    def run_on_main(self, check: Callable[[], Value]) -> Value | None:
        """The same for what rank 0 does alone."""
        return self.attempt(partial(process_group.on_main, check))

    def run_once_per_host(self, build: Callable[[], Value]) -> Value | None:
        """The same for what fills a cache that the ranks of a host share."""
        return self.attempt(partial(process_group.once_per_host, build))


def _on_all_ranks(check: Callable[[], Value]) -> Value:
    with process_group.raise_on_all_ranks():
        return check()
