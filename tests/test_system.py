"""What qvtune.system promises of imports."""

import gc

import pytest

from qvtune.system import heavy_imports


@pytest.mark.parametrize("error", [None, ImportError])
def test_nothing_is_collected_during_heavy_imports_and_never_again_what_they_made(
    error: type[ImportError] | None,
) -> None:
    collections: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        collections.append(phase)

    gc.callbacks.append(note)
    try:
        with heavy_imports():
            frozen_before = gc.get_freeze_count()
            imported = [[] for _ in range(2 * gc.get_threshold()[0])]  # type: ignore[var-annotated]
            assert collections == []
            if error is not None:
                raise error
    except ImportError:
        assert error is not None
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen_before + len(imported)
    assert not any(young is imported for young in gc.get_objects())
