"""The files of a model folder that are neither weights nor configuration."""

import shutil
from pathlib import Path

from qvtune.model.fingerprint import MANIFEST

# Tokenizers, templates, generation settings, code of the model, licences; no weights of any format.
_SUFFIXES = {".json", ".jinja", ".model", ".tiktoken", ".txt", ".py"}
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_OURS = ("config.json", MANIFEST)
_TEMPLATES = "additional_chat_templates"


def copy_companions(base: Path, folder: Path) -> None:
    """Tokenizer, chat templates, generation settings, model code and licences of the base, as they are."""
    for path in sorted(base.iterdir()):
        wanted = path.suffix in _SUFFIXES or path.name.upper().startswith(_LICENCES)
        if path.is_file() and wanted and path.name not in _OURS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    if (base / _TEMPLATES).is_dir():
        shutil.copytree(base / _TEMPLATES, folder / _TEMPLATES)
