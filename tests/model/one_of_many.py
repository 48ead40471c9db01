"""One rank without its peers. As a process: python -m tests.model.one_of_many FOLDER RANK NUM_RANKS RESULT.json"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from qvtune.config.schema import ModelSection
from qvtune.model.loader import Base, LoadReport, fill, open_base
from qvtune.model.nf4 import NF4Linear
from qvtune.model.shard import Shard
from tests.support.tiny import make_model_folder

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Alone:
    """A placement that keeps the rank's pieces as they are, where DeepSpeed would add the whole shape.

    In a collective every other rank contributes the same, in memory of its own.
    """

    shard: Shard
    device: torch.device = CPU

    def parameter(self, shape: tuple[int, ...], piece: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(piece, requires_grad=False)

    def all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        return [own.clone() for _ in range(self.shard.num_ranks)]


def load(folder: Path, shard: Shard) -> tuple[Base, LoadReport]:
    """The real opening and filling."""
    base = open_base(folder, ModelSection(), torch.bfloat16, "sdpa")
    report, _ = fill(base, Alone(shard), torch.bfloat16)
    return base, report


def resident_bytes_now() -> int:
    """Resident memory of this process at this moment."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def main() -> None:
    """Load a tiny model, so that all code is in memory, then the folder; note what that has added."""
    folder, result = Path(sys.argv[1]), Path(sys.argv[4])
    load(make_model_folder(result.with_name("warm-up")), Shard(0, 2))
    idle = resident_bytes_now()
    base, report = load(folder, Shard(int(sys.argv[2]), int(sys.argv[3])))
    offsets = [module.offset.item() for module in base.skeleton.modules() if isinstance(module, NF4Linear)]
    result.write_text(json.dumps({**asdict(report), "idle_bytes": idle, "offsets": offsets}))


if __name__ == "__main__":
    main()
