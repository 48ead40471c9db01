"""What a converted folder is read by: each of these, in a process of its own, for ``--check-with``."""

from importlib.util import find_spec

from qvtune.config.outputs import FormatName, ReaderName
from qvtune.errors import UserError

PACKAGES: dict[ReaderName, str] = {"transformers": "transformers", "vllm": "vllm", "llama.cpp": "xllamacpp"}
_READ_BY: dict[FormatName, tuple[ReaderName, ...]] = {
    "merged": ("transformers", "vllm"),
    "adapter": ("transformers", "vllm"),
    "bnb-4bit": ("transformers", "vllm"),
    "gguf": ("llama.cpp",),
}


def require_reader(reader: ReaderName, format: FormatName) -> None:
    """Raises UserError where the reader is not installed, or does not read this format; imports nothing."""
    problems = []
    if find_spec(PACKAGES[reader]) is None:
        problems.append(f"{reader} is not installed here: `pip install {PACKAGES[reader]}`, or leave the option out")
    if reader not in _READ_BY[format]:
        formats = [name for name, readers in _READ_BY.items() if reader in readers]
        problems.append(f"{reader} does not read --format {format}; it reads {', '.join(formats)}")
    if problems:
        raise UserError(problems, "--check-with")
