"""What launch/convert.py takes; apart from the code that opens it, so that a wrong path is answered without torch."""

from pathlib import Path

from qvtune.errors import UserError

KINDS = (
    "a folder runs/NAME/checkpoints/step-* or a run folder that has one, a PEFT adapter folder (adapter_config.json, "
    "adapter_model.safetensors), or a folder with DeepSpeed's global_step*"
)


def require_source(path: Path) -> None:
    """Raise UserError where there is nothing at ``path``."""
    if not path.exists():
        raise UserError(f"{path}: no checkpoint, there is nothing of this name; give {KINDS}")
