"""Who is named when nodes differ."""

from typing import Any

import pytest

from qvtune.doctor.compare import attribute, compare
from qvtune.doctor.findings import NOT_COMPARED, RECIPE, SEVERAL, Finding, Report, Verdict, outliers, to_exclude
from qvtune.doctor.table import verdict

HOSTS = ("a", "b", "c", "d")


def reports(num: int = 4, **changes: dict[str, Any]) -> dict[int, Report]:
    """Of healthy nodes; ``changes`` are a host's figures and, under ``facts``, facts."""
    healthy: dict[str, Any] = {
        "sees": list(range(num)),
        "clock_offset": 0.0,
        "file_clock_offset": 0.0,
        "unreachable": [],
    }
    made = {}
    for node, host in enumerate(HOSTS[:num]):
        figures = healthy | changes.get(host, {})
        facts = {"torch": "2.13.0", "code": "c0de", **figures.pop("facts", {})}
        made[node] = Report(node, host, (), facts, figures)
    return made


def failed(made: dict[int, Report], num: int = 4) -> list[tuple[str, str]]:
    found = compare(made, HOSTS[:num], seconds=32)
    return [(host, finding.check) for host, finding in found if finding.status == "fail"]


@pytest.mark.parametrize("num", [1, 2, 4])
def test_healthy_nodes(num: int) -> None:
    assert failed(reports(num), num) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"c": {"facts": {"torch": "2.12.0"}}}, [("c", "same torch")]),
        ({"b": {"facts": {"base": "missing"}}}, [("b", "same base")]),
        ({"c": {"sees": [2]}}, [("c", "run folder shared")]),
        ({"a": {"clock_offset": 0.0}, **{host: {"clock_offset": 300.0} for host in "bcd"}}, [("a", "clocks")]),
        ({"d": {"clock_offset": -300.0}}, [("d", "clocks")]),
        ({host: {"unreachable": [3]} for host in "abc"}, [("d", "between nodes")]),
        ({"b": {"unreachable": [2]}}, [("b", "between nodes")]),
        ({"b": {"unreachable": [0, 2, 3]}}, [("b", "between nodes")]),
    ],
)
def test_the_one_that_differs_is_named(changes: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert failed(reports(**changes)) == expected


def test_a_missing_node_is_named() -> None:
    made = reports()
    del made[2]
    assert failed(made) == [("c", "report")]


def test_of_two_clocks_the_one_that_differs_from_the_files() -> None:
    late = {"b": {"clock_offset": 300.0}}
    assert failed(reports(2, a={"file_clock_offset": -300.0}, **late), 2) == [("a", "clocks")]
    assert failed(reports(2, **late), 2) == [("a", "clocks"), ("b", "clocks")]


@pytest.mark.parametrize(
    ("values", "expected"),
    [("111", []), ("112", ["c"]), ("122", ["a"]), ("12", ["a", "b"]), ("123", ["a", "b", "c"]), ("", [])],
)
def test_outliers(values: str, expected: list[str]) -> None:
    assert outliers(dict(zip("abc", values, strict=False))) == expected


def found(*failures: tuple[str, str, str]) -> list[Verdict]:
    return [(host, Finding(check, "fail", detail)) for host, check, detail in failures]


def test_a_master_that_nobody_reaches_is_at_fault() -> None:
    cut = found(*((host, "reach master", "refused") for host in "bcd"))
    assert [host for host, _ in attribute(cut, HOSTS)] == ["a"]
    assert [host for host, _ in attribute(cut[:2], HOSTS)] == ["b", "c"]
    assert [host for host, _ in attribute(cut[:1], HOSTS[:2])] == ["b"], "of two nodes either may be at fault"


def test_a_collective_that_fails_blames_only_who_says_something_else() -> None:
    late = found(*((host, "collective", "timed out") for host in "abd"), ("c", "collective", "no such library"))
    assert [host for host, _ in attribute(late, HOSTS)] == ["c", SEVERAL]
    all_different = found(*((host, "collective", f"closed by {host}") for host in HOSTS))
    assert [host for host, _ in attribute(all_different, HOSTS)] == [SEVERAL]


def test_what_fails_everywhere_excludes_nobody() -> None:
    everywhere = found(*((host, "GPUs", "4 of 8") for host in HOSTS))
    assert to_exclude(everywhere, HOSTS) == []
    assert "--exclude" not in verdict(everywhere, HOSTS)
    here = found(("c", "disk", "full"), (SEVERAL, "collective", "timed out"))
    assert verdict(everywhere + here, HOSTS) == "NO-GO because of c; to run on the other nodes: --exclude=c"


def test_a_base_that_is_not_in_a_nodes_cache_yet_differs_from_none() -> None:
    later = {"facts": {"base": NOT_COMPARED}}
    same = {host: {"facts": {"base": "b1"}} for host in "abc"}
    assert failed(reports(**same, d=later)) == []
    assert failed(reports(**same | {"c": {"facts": {"base": "b2"}}}, d=later)) == [("c", "same base")]
    assert failed(reports(**dict.fromkeys("abcd", later))) == []


def test_a_problem_of_the_recipe_on_one_node_only_excludes_that_node() -> None:
    everywhere = found(*((host, RECIPE, "data.eval: no such file") for host in HOSTS))
    assert to_exclude(everywhere, HOSTS) == []
    assert to_exclude(everywhere + found(("b", RECIPE, "data.train: no such file")), HOSTS) == ["b"]
