"""Which DeepSpeed configuration a base gets."""

import pytest

from qvtune.config.zero_stage import GIB, RESERVED, choose_stage, usable_bytes
from qvtune.versions import repository


@pytest.mark.parametrize(
    ("base", "other", "gpus_per_node", "nodes", "file", "fits"),
    [
        (5, 20, 8, 4, "zero2.json", True),  # whole, however many nodes there are
        (40, 50, 8, 1, "zero3.json", True),  # no second copy within a single node
        (40, 50, 8, 4, "zero3_hpz.json", True),
        (400, 20, 8, 4, "zero3.json", True),  # the second copy would take 50
        (40, 50, 1, 4, "zero3.json", True),  # a node of one GPU has nobody to share with
        (40, 80, 8, 4, "zero3.json", False),
    ],
)
def test_the_least_communication_that_fits(
    base: int, other: int, gpus_per_node: int, nodes: int, file: str, fits: bool
) -> None:
    choice = choose_stage(base * GIB, 2 * GIB, other * GIB, 80 * GIB, gpus_per_node, nodes)
    assert (choice.file, choice.fits) == (file, fits)
    assert (repository() / "ds_configs" / choice.file).is_file()
    assert f"{usable_bytes(80 * GIB) / GIB:.1f} GiB" in choice.reason


def test_the_reason_names_what_did_not_fit_and_the_numbers() -> None:
    choice = choose_stage(40 * GIB, 2 * GIB, 50 * GIB, 80 * GIB, 8, 4)
    assert "zero2.json needs 90.0 GiB" in choice.reason
    assert "all else 50.0 GiB: 58.2 GiB of 70.2 GiB usable" in choice.reason  # 40/32 + 40/8 + 2 + 50


def test_a_whole_base_that_just_fits_and_one_byte_more() -> None:
    room = int((80 * GIB - RESERVED) * 0.9)
    assert choose_stage(room, 0, 0, 80 * GIB, 8, 1).file == "zero2.json"
    assert choose_stage(room + 1, 0, 0, 80 * GIB, 8, 1).file == "zero3.json"
