"""What a study's job array is given, by an sbatch that only notes its arguments; with a real Slurm: tests/slurm."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from qvtune.errors import UserError
from qvtune.study.cell import read_cells
from qvtune.study.submit import ArrayRequest, submit_grid

SBATCH = """#!{python}
import json, os, sys
json.dump([sys.argv[1:], os.environ["QVTUNE_HOME"]], open({noted!r}, "w"))
print("17;cluster")
"""


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A grid of two cells, on a machine with sbatch."""
    recipe = {"run_dir": str(tmp_path / "study"), "data": {"eval": "demo"}, "train": {"max_steps": 6}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "factors": {"seed": [0, 1]}}))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH.format(python=sys.executable, noted=str(tmp_path / "noted.json")))
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    (tmp_path / "cluster.env").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("QVTUNE_CLUSTER_ENV", str(tmp_path / "cluster.env"))
    monkeypatch.delenv("SBATCH_EXPORT", raising=False)
    return tmp_path / "grid.yaml"


def test_an_array_gets_the_study_and_a_copy_of_the_code(grid: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    failed = study / "cells" / "seed1" / "failed.txt"
    failed.parent.mkdir(parents=True)
    failed.write_text("no room\n")
    assert submit_grid(grid, [], ArrayRequest(3, ["--time=1:00:00"], ranks_per_cell=2)) == "17"
    (first, second, *options, script, folder, ranks), home = json.loads((tmp_path / "noted.json").read_text())
    assert [first, second, *options] == ["--parsable", "--array=0-2", "--time=1:00:00"]
    assert (folder, ranks, script) == (str(study), "2", f"{home}/slurm/study.sbatch")
    assert Path(home).parent == study / "submitted"
    assert all((Path(home) / name).exists() for name in ("src/qvtune/study/run.py", "slurm/settings.sh", "ds_configs"))
    assert [cell.name for cell in read_cells(study)] == ["seed0", "seed1"] and (study / "recipe.yaml").is_file()
    assert not failed.exists(), "is tried again"


def test_what_cannot_be_submitted_writes_nothing(grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVTUNE_CLUSTER_ENV", str(tmp_path / "none.env"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError) as caught:
        submit_grid(grid, [], ArrayRequest(1, ["time=1", "--export=A"]))
    problems = "\n".join(caught.value.problems)
    assert all(part in problems for part in ("--sbatch=time=1", "--export=A", "sbatch is not on PATH", "none.env"))
    assert not (tmp_path / "study").exists()
