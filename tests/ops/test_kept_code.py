"""Machine code is made once on a machine; whatever happens to what is kept, a run gets it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hsrloop.ops import kept_code
from hsrloop.ops.kept_code import kept


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hsrloop" / "kernels"


class Compiler:
    """Makes other code each time."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> bytes:
        self.times += 1
        return b"code %d" % self.times


def test_code_is_made_once_for_the_same_texts() -> None:
    make = Compiler()
    assert kept(["a", "b"], make) == kept(["a", "b"], make) == b"code 1"
    assert kept(["ab"], make) == b"code 2"
    assert kept(["a", "b", ""], make) == b"code 3"
    assert kept(["a", "b"], make) == b"code 1"


@pytest.mark.parametrize("damage", [b"", b"x", b"code 1" + bytes(32)])
def test_what_is_damaged_is_made_again(damage: bytes, folder: Path) -> None:
    make = Compiler()
    kept(["a"], make)
    (file,) = folder.iterdir()
    file.write_bytes(damage)
    assert kept(["a"], make) == kept(["a"], make) == b"code 2"


def test_a_folder_that_cannot_be_made_costs_time_alone(folder: Path) -> None:
    folder.parent.write_text("a file")
    make = Compiler()
    assert kept(["a"], make) == b"code 1"
    assert kept(["a"], make) == b"code 2"


def test_an_error_is_told_and_nothing_kept(folder: Path) -> None:
    def fail() -> bytes:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        kept(["a"], fail)
    assert not folder.exists()


def test_what_was_used_longest_ago_goes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_code, "MOST", 2)
    make = Compiler()
    for number, name in enumerate("ab"):
        kept([name], make)
        for file in folder.iterdir():
            os.utime(file, (number, number))
    kept(["a"], make)  # used just now
    kept(["c"], make)
    assert len(list(folder.iterdir())) == 2
    assert kept(["a"], make) == b"code 1" and kept(["c"], make) == b"code 3"
    assert kept(["b"], make) == b"code 4"
