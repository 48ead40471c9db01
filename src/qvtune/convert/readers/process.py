"""The process of a reader: python -m qvtune.convert.readers.process REQUEST.json ANSWER.json

The request is ``Request`` as JSON, the answer ``Answer``. No code of the merge or of the proof is imported here.
"""

import importlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MODULES = {"transformers": "with_transformers", "vllm": "with_vllm", "llama.cpp": "with_llama_cpp"}


@dataclass(frozen=True)
class Request:
    """``arguments``: how ``reader`` loads the folder. ``prompts``: token ids. At most ``max_new_tokens`` follow each,
    the most likely ones; of a classifier (``max_new_tokens`` 0) the most likely class."""

    reader: str
    arguments: dict[str, Any]
    prompts: list[list[int]]
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """``tokens`` of each prompt, with the one that ended them; ``dtype`` is what the reader computed in."""

    tokens: list[list[int]]
    dtype: str
    version: str


def main() -> None:
    """Read, and leave the answer."""
    request = Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    reader = importlib.import_module(f"qvtune.convert.readers.{MODULES[request.reader]}")
    answer: Answer = reader.read(request)
    Path(sys.argv[2]).write_text(json.dumps(asdict(answer)), encoding="utf-8")


if __name__ == "__main__":  # vLLM starts processes that import this module again
    main()
