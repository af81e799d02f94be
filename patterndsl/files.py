"""How is a file written so that nobody ever sees half of it? A sibling is filled first, then takes the name."""

from __future__ import annotations

import os
import stat
from os import PathLike
from pathlib import Path

from patterndsl.diagnostics import PatternError, error


def write_atomically(
    path: str | PathLike[str], data: bytes, overwrite: bool = False, switch: str = "overwrite=True"
) -> None:
    """Writes the file whole or not at all; a link is followed, a pipe or device is simply written to.

    switch: what overwrites, as the caller's user writes it. Raises PatternError (E602) where the file exists, unless
    overwrite, and where it cannot be written.
    """
    shown, target = str(path), Path(os.path.realpath(path))
    try:
        if target.is_dir():
            raise error("E602", f"cannot write {shown}: it is a folder", None, "name a file in it")
        if target.exists() and not target.is_file():
            target.write_bytes(data)
        else:
            _write_file(shown, target, data, overwrite, switch)
    except OSError as failed:
        raise _refused(shown, target, failed) from None


def refuse_unwritable(path: str | PathLike[str], *, overwrite: bool) -> None:
    """For a command that would work long before it writes. Raises PatternError (E602) where the file is there, unless
    overwrite, and where its folder is not."""
    shown, target = str(path), Path(os.path.realpath(path))
    if not overwrite:
        _refuse_existing(shown, target, "--force")
    if not target.parent.exists():
        raise _no_folder(shown, target.parent)


def _refuse_existing(shown: str, target: Path, switch: str) -> None:
    if target.is_file():
        raise _exists(shown, switch)


def _write_file(shown: str, target: Path, data: bytes, overwrite: bool, switch: str) -> None:
    if not overwrite:
        _refuse_existing(shown, target, switch)
    sibling = target.with_name(f".{target.name[:200]}.{os.getpid()}.{os.urandom(4).hex()}.part")
    try:
        with open(sibling, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.is_file():
            os.chmod(sibling, stat.S_IMODE(target.stat().st_mode))
        if overwrite:
            os.replace(sibling, target)
        else:
            _name_anew(shown, sibling, target, switch)
    finally:
        sibling.unlink(missing_ok=True)


def _name_anew(shown: str, sibling: Path, target: Path, switch: str) -> None:
    """Gives the file its name unless it was taken meanwhile, by a link where there are links."""
    try:
        os.link(sibling, target)
    except FileExistsError:
        raise _exists(shown, switch) from None
    except OSError:
        _refuse_existing(shown, target, switch)
        os.replace(sibling, target)


def _exists(shown: str, switch: str) -> PatternError:
    return error("E602", f"{shown} exists already", None, f"choose another name, or overwrite it: {switch}")


def _no_folder(shown: str, folder: Path) -> PatternError:
    return error("E602", f"cannot write {shown}: there is no folder {folder}", None, f"make it: mkdir -p {folder}")


def _refused(shown: str, target: Path, failed: OSError) -> PatternError:
    folder = target.parent
    if not folder.exists():
        return _no_folder(shown, folder)
    help = "choose a folder that you may write to" if isinstance(failed, PermissionError) else "choose another place"
    return error("E602", f"cannot write {shown}: {failed.strerror or failed}", None, help)
