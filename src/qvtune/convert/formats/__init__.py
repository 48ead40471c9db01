"""What a conversion can end in: each module here is one format, which it writes, and reads again for the proof."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from qvtune.config.outputs import BaseChoice, FormatName, ReaderName

if TYPE_CHECKING:  # transformers comes with them, and with the formats
    from qvtune.convert.conversion import Conversion
    from qvtune.convert.merge.write import Written
    from qvtune.convert.proof.proof import Limits
    from qvtune.convert.proof.views import ModelViews
    from qvtune.storage.partial import PartialOutput

_MODULES = {"merged": "merged", "adapter": "peft_folder", "bnb-4bit": "four_bit", "gguf": "gguf_file"}


class OutputFormat(Protocol):
    """The functions of such a module. ``PREFERS``: the base weights where the user has not chosen; None: training's."""

    PREFERS: "BaseChoice | None"

    def require(self, conversion: "Conversion") -> None:
        """Raises UserError, before anything is written, where this format cannot hold what was trained."""

    def write(
        self, partial: "PartialOutput", conversion: "Conversion", max_shard_bytes: int, num_threads: int
    ) -> "Written":
        """Everything but report and card, into ``partial``. Raises as ``qvtune.convert.merge.write.write_weights``."""

    def views(self, conversion: "Conversion", folder: Path) -> "ModelViews":
        """The models that the proof compares, the ``merged`` one read from ``folder``.

        Raises ProofError where that is not what was written.
        """

    def limits(self, conversion: "Conversion") -> "Limits":
        """How far that one may be from base + adapter."""

    def how_to_load(self, conversion: "Conversion", title: str) -> str:
        """Markdown for the model card; ``title`` is the name of the output folder."""

    def how_to_serve(self, conversion: "Conversion", title: str) -> str:
        """The same for a server."""

    def arguments(self, reader: "ReaderName", conversion: "Conversion", folder: str) -> dict[str, Any]:
        """How ``reader`` loads ``folder`` (qvtune.convert.readers). Raises UserError for what it cannot load."""


def output_format(name: FormatName) -> OutputFormat:
    """The format of this name; only now are its libraries imported."""
    return cast(OutputFormat, import_module(f"{__name__}.{_MODULES[name]}"))
