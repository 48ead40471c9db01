"""zero3_hpz.json on 4 ranks, of which two each are a node: what crosses the border between the nodes."""

import json

from qvtune.versions import repository
from tests.support.lab import Lab

NUM_RANKS, NODE, PADDING = 4, 2, 1.02


def test_the_base_crosses_the_node_border_once(lab: Lab) -> None:
    content = json.loads((repository() / "ds_configs" / "zero3_hpz.json").read_text())
    content["zero_optimization"]["zero_hpz_partition_size"] = NODE
    path = lab.folder / "hpz.json"
    path.write_text(json.dumps(content))
    changes = {
        "data__packing": False,  # the check of the packing would gather the base before the first step
        "train__max_steps": 4,
        "train__global_batch_size": NUM_RANKS,
        "train__activation_checkpointing": True,
    }
    job = {"name": "hpz", "do": "gathers", "config": lab.config("hpz", deepspeed=str(path), **changes)}
    for end in lab.launch("hpz", NUM_RANKS, [job]):
        assert end.code == 0, end.output

    for rank in lab.results("hpz", NUM_RANKS):
        found = rank["hpz"]
        base, small = found["all"] - found["small"], found["small"]
        assert small < base / 5
        first, *later = ({int(size): num_bytes for size, num_bytes in step.items()} for step in found["steps"])
        assert base <= first[NUM_RANKS]
        for step in later:
            assert step[NUM_RANKS] <= PADDING * small  # adapters, which have changed, and what stays whole
            assert base <= step[NODE]
