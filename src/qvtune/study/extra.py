"""The packages of the optional extra ``study`` of setup.cfg."""

from importlib.util import find_spec

from qvtune.errors import UserError


def require_extra(*packages: str) -> None:
    """Raises UserError naming those of ``packages`` that are not installed; imports none of them."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise UserError(
            f"launch/study.py needs {' and '.join(missing)}, not installed here: run `make env`, or install the extra "
            "`study` of setup.cfg"
        )
