"""Memory of a merge: a stand-in for the 8B model that was merged and proved by hand (README.md, "Measured")."""

import os
from pathlib import Path
from typing import Any

import pytest

from qvtune.convert import convert as conversion
from qvtune.convert.formats import merged
from qvtune.convert.proof.layers import empty_model
from qvtune.system import peak_rss_bytes
from tests.benchmarks.merge import make_run
from tests.model.one_of_many import resident_bytes_now
from tests.model.sparse import LLAMA_3_1_8B, make_sparse_folder
from tests.support.tiny import make_tokenizer

MEBIBYTE = 2**20
CONFIG = LLAMA_3_1_8B | {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
}


def added_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], quantization: Any, end: tuple[Any, str]
) -> int:
    """What a conversion takes up to the call of ``end``, in a fork, whose peak begins with what it holds."""
    base = make_sparse_folder(tmp_path / "base", config)
    make_tokenizer().save_pretrained(base)
    run = make_run(tmp_path / "run", base, config, quantization)
    empty_model(base, {}, trust_remote_code=False)  # imports what the fork would
    child = os.fork()
    if child == 0:
        idle = resident_bytes_now()

        def note_and_exit(*_: Any) -> None:
            (tmp_path / "added").write_text(str(peak_rss_bytes() - idle))
            os._exit(0)

        try:
            monkeypatch.setattr(*end, note_and_exit)
            conversion.convert(run, tmp_path / "merged", dtype="bfloat16", num_threads=8)
        finally:
            os._exit(70)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return int((tmp_path / "added").read_text())


# The embedding and the head are 125 MiB each, so two of eight threads that held one each would add 250 MiB. Seen are
# 106 and 148 in all, much of it pages of libraries, which a fork maps anew when it needs them; 230 and 400 where each
# thread's heap keeps what is freed.
@pytest.mark.parametrize(("quantization", "limit"), [("none", 180), ("nf4", 240)])
def test_a_merge_never_holds_its_largest_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: Any, limit: int
) -> None:
    added = added_bytes(tmp_path, monkeypatch, CONFIG, quantization, (merged, "write_companions"))
    assert added < limit * MEBIBYTE, f"{added / MEBIBYTE:.0f} MiB"


# Three views, of each of which 64 MiB of the head are there at a time, and a layer of one (86 MiB in fp32). Seen are
# 640 to 750 MiB with one layer as with six; a single view that was held whole would add 430.
@pytest.mark.slow
def test_a_proof_never_holds_more_than_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG | {"num_hidden_layers": 6}
    added = added_bytes(tmp_path, monkeypatch, config, "none", (conversion, "_finish"))
    assert added < 900 * MEBIBYTE, f"{added / MEBIBYTE:.0f} MiB"
