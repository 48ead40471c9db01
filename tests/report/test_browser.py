"""report.html in Chromium. QVTUNE_REQUIRE_BROWSER=1: where it is missing the tests fail instead of being skipped."""

from pathlib import Path

import pytest

from qvtune.report.compare_page import compare_page
from qvtune.report.run_page import write_page, write_report
from qvtune.report.run_record import read_runs
from tests.report.runs import answers, events, merge_report, write_run
from tests.support.browser import Seen, look_at, require_chromium

PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def _browser() -> None:
    require_chromium()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with everything that a page can show."""
    before = answers(0, "5", "2 + 2 is " + 300 * "4, " + "\nor more")
    starts = events(1777, every=100, is_complete=False), events(3000, 1700, every=100)
    run_dir = write_run(tmp_path / "run", starts[0], iter([before]), starts[1], iter([answers(3000, "4", "4")]))
    merge_report(run_dir)
    return run_dir


def assert_shown(seen: Seen, num_pictures: int) -> None:
    assert seen.requests == [] and seen.problems == []
    assert seen.drawn == num_pictures and seen.clipped == []
    assert seen.overflow == 0, "the page is as wide as the window"
    assert seen.png.startswith(PNG) and len(seen.png) > 50_000


@pytest.mark.parametrize("width", [1400, 500])
def test_the_report_is_shown_as_it_is_written(run_dir: Path, width: int) -> None:
    page = write_report(run_dir)
    assert page.stat().st_size < 2e6
    assert_shown(look_at(page, width), num_pictures=12)


def test_the_comparison_is_shown_as_it_is_written(run_dir: Path, tmp_path: Path) -> None:
    other = write_run(
        tmp_path / "a run with a long name, as a grid gives them_lr0.001_lr_multipliers=-v-4.0-", events(50)
    )
    page = write_page(compare_page(read_runs([run_dir, other])), tmp_path / "both.html")
    assert_shown(look_at(page), num_pictures=5)


def test_what_would_be_wrong_with_a_page_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    image, script = '<img src="http://127.0.0.1:9/x.png">', "<script>console.error('said'); undefined.x</script>"
    text = '<svg width="50" height="50"><text x="40" y="20">a long text</text></svg>'
    page.write_text(f'<!DOCTYPE html><body>{image}{script}{text}<div style="width: 3000px">wide</div>')
    seen = look_at(page)
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
    assert any("said" in one for one in seen.problems) and any("undefined" in one for one in seen.problems)
    assert seen.overflow > 1000 and seen.drawn == 1 and seen.clipped == ["a long text"]
