"""The tracker against tensors whose sizes are known, and the process group that pretends."""

import os

import torch
from torch import nn

from qvtune.distributed import process_group
from qvtune.distributed.fake_ranks import fake_ranks
from qvtune.plan.tracker import Tracker


def test_peaks_count_what_is_alive_by_cause_and_phase() -> None:
    tracker = Tracker()
    with tracker:
        with tracker.under("kept"):
            kept = torch.ones(1000)
        tracker.enter("work")
        with tracker.under("temporary"):
            temporary = kept + 1  # 4,000 bytes
            view = temporary[:10]
            del temporary
            larger = torch.cat([kept, kept])  # 8,000 bytes beside it, since the view keeps its storage
            del view
    assert tracker.tracked.current == {"kept": 4000, "temporary": 8000}
    assert tracker.tracked.peaks["work"] == {"kept": 4000, "temporary": 12000}
    assert tracker.tracked.peaks["start"] == {"kept": 4000}
    tracker.restart()
    assert tracker.tracked.peaks == {} and tracker.tracked.current.total() == 12000
    del larger
    assert tracker.tracked.current["temporary"] == 0


def test_backward_is_counted_and_frozen_parameters_are_no_obstacle() -> None:
    layer = nn.Linear(64, 32, bias=False).requires_grad_(False)
    inputs = torch.ones(8, 64, requires_grad=True)
    tracker = Tracker()
    with tracker:
        layer(inputs).sum().backward()
    flop = sum(flop * count for (flop, _), count in tracker.tracked.operations.items())
    assert flop == 2 * 2 * 8 * 64 * 32, "forward, and the gradient of the inputs"
    assert sum(count for (flop, _), count in tracker.tracked.operations.items() if flop) == 2
    read_and_written = {num_bytes for (flop, num_bytes) in tracker.tracked.operations if flop}
    assert read_and_written == {4 * (8 * 64 + 64 * 32 + 8 * 32)}


def test_ranks_are_pretended_as_often_as_wanted() -> None:
    before = dict(os.environ)
    for size in (3, 512):
        with fake_ranks(size):
            assert (process_group.rank(), process_group.world_size()) == (0, size)
            gathered, tracker = torch.empty(4 * size), Tracker()
            with tracker:
                torch.distributed.all_gather_into_tensor(gathered, torch.ones(4))
            assert tracker.tracked.gathered == {size: 16 * size}
        assert process_group.world_size() == 1 and not torch.distributed.is_initialized()
    assert dict(os.environ) == before
