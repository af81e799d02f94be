"""Is a file written whole or not at all, and refused where it should be?"""

import os
import stat
from pathlib import Path

import pytest

from patterndsl.diagnostics import PatternError
from patterndsl.files import refuse_unwritable, write_atomically


def test_writes_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.bin", b"one")
    assert (tmp_path / "a.bin").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_refuses_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(PatternError, match=r"error\[E602\]: .*a.bin exists already\n.*overwrite it: overwrite=True$"):
        write_atomically(path, b"new")
    with pytest.raises(PatternError, match=r"E602(?s:.*)overwrite it: --force$"):
        refuse_unwritable(path, overwrite=False)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_overwrites_when_told_and_keeps_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    path.chmod(0o640)
    write_atomically(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    sync = os.fsync

    def appears(descriptor: int) -> None:
        path.write_bytes(b"theirs")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", appears)
    with pytest.raises(PatternError, match="exists already"):
        write_atomically(path, b"ours")
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_without_links_the_file_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError("this file system has no links")

    monkeypatch.setattr(os, "link", no_links)
    write_atomically(tmp_path / "a.bin", b"one")
    assert (tmp_path / "a.bin").read_bytes() == b"one"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PatternError, match=r"E602.*No space left on device"):
        write_atomically(path, b"new", overwrite=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PatternError, match=r"E602.*there is no folder(.|\n)*mkdir -p"):
        write_atomically(tmp_path / "no" / "a.bin", b"")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(PatternError, match=r"E602.*it is a folder"):
        write_atomically(tmp_path, b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PatternError, match=r"E602.*Permission denied(.|\n)*may write"):
        write_atomically(tmp_path / "a.bin", b"")


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", b"one")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"one"


def test_a_device_is_written_to_and_not_replaced() -> None:
    write_atomically("/dev/null", b"one")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
