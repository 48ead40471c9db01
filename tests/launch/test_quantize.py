"""launch/quantize.py as it is typed."""

from pathlib import Path

from tests.support.forks import fork_command
from tests.support.processes import REPOSITORY

QUANTIZE = REPOSITORY / "launch" / "quantize.py"


def test_it_makes_a_folder_and_says_what_is_wrong(tmp_path: Path, llama_folder: Path) -> None:
    command: list[str | Path] = [QUANTIZE, llama_folder, "--output", tmp_path / "nf4"]
    made = fork_command(command, tmp_path / "first", timeout=120)
    assert made.code == 0, made.output
    assert (tmp_path / "nf4" / "nf4_manifest.json").is_file()
    again = fork_command(command, tmp_path / "second", timeout=120)
    assert again.code == 2, again.output
    assert f"error: --output: {tmp_path / 'nf4'} is not empty" in again.stderr and "Traceback" not in again.stderr
