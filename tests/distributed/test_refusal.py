"""What must end a run on all ranks."""

import re

from qvtune.checkpoint.folder import newest
from tests.distributed.conftest import Results
from tests.support.lab import MAX_STEPS, Lab


def test_attention_that_leaks_between_documents_ends_the_run(lab: Lab, two: Results) -> None:
    for result in two:
        assert "lets documents attend to each other" in result["leaking"]["message"]
    assert lab.events("leaking", "step") == []
    assert newest(lab.run_dir("leaking") / "checkpoints") is None


def test_a_loss_that_is_not_finite_ends_the_run_on_all_ranks(lab: Lab, two: Results) -> None:
    """One row of the data, hence one rank in one step, meets a token whose embedding is NaN."""
    messages = {result["rare"]["message"] for result in two}
    assert len(messages) == 1
    message = messages.pop()
    found = re.match(r"step (\d+): the loss is nan", message)
    assert found is not None
    (place,) = re.findall(r"\n  rank [01], micro-batch [123]: (.*)", message)
    assert place == f"{lab.folder / 'rare.jsonl'}, row 1"
    bad_step = int(found[1])
    assert 1 < bad_step <= MAX_STEPS
    assert [entry["step"] for entry in lab.events("rare", "step")] == list(range(1, bad_step))
    (failed,) = lab.events("rare", "run_failed")
    assert failed["step"] == bad_step - 1 and message in failed["error"]
    assert (
        newest(lab.run_dir("rare") / "checkpoints") == lab.run_dir("rare") / "checkpoints" / f"step-{bad_step - 1:08d}"
    )


def test_a_base_with_nan_is_refused_by_the_name_of_the_tensor_before_a_run_folder_is_made(
    lab: Lab, two: Results
) -> None:
    for result in two:
        assert "tensor 'model.embed_tokens.weight' holds NaN or infinite values" in result["poisoned"]["message"]
    assert not lab.run_dir("poisoned").exists()
