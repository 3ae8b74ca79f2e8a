"""Output folders: written beside their place, moved there when they are whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_groupdpo.errors import CheckpointError
from megatron_groupdpo.processes import errors_reach_all_ranks, on_first_rank


def check_target(target: Path, *, overwrite: bool, marker: str, source: Path | None) -> None:
    """Refuse an output folder before any work is done.

    Args:
        target: the folder to be made.
        overwrite: replace a folder that is there.
        marker: a file that every folder of this kind has; others are never replaced.
        source: what is read, if anything; it must not be lost with the replaced folder.

    Raises:
        CheckpointError: one of these rules is broken.
    """
    here, there = target.resolve(), None if source is None else source.resolve()
    if there is not None and (here == there or here in there.parents or there in here.parents):
        raise CheckpointError(
            f"{target}: the output must not be the input {source}, in it or around it; choose another"
        )
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: a file is there; choose another place for the output folder")
    if not overwrite:
        raise CheckpointError(f"{target}: exists and is not empty; pass --overwrite to replace it, or choose another")
    if not (target / marker).exists():
        raise CheckpointError(
            f"{target}: --overwrite replaces folders with a {marker} only, and this one has none; choose another"
        )


@contextmanager
def new_folder(target: Path, *, overwrite: bool, marker: str, source: Path | None) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes it when the block ends without error, else vanishes.

    Raises:
        CheckpointError: see :func:`check_target`; or the disk fails.
    """
    check_target(target, overwrite=overwrite, marker=marker, source=source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error}); choose another place") from None
    try:
        yield partial
        _open_to_umask(partial)
        check_target(target, overwrite=overwrite, marker=marker, source=source)  # it may have appeared meanwhile
        _move(partial, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error}); nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_folder_of_all_ranks(target: Path, *, overwrite: bool, marker: str, source: Path | None) -> Iterator[Path]:
    """As :func:`new_folder`, with one folder for all ranks; an error of any leaves nothing and is raised on all.

    The file system is one that all ranks see.
    """
    with ExitStack() as stack:
        new = new_folder(target, overwrite=overwrite, marker=marker, source=source)
        partial = on_first_rank(lambda: stack.enter_context(new))
        with errors_reach_all_ranks():
            yield partial
        on_first_rank(stack.close)


def _move(partial: Path, target: Path) -> None:
    if not target.exists():
        os.rename(partial, target)
        return
    aside = target.with_name(f".{target.name}.{partial.name.split('.')[-2]}.old")
    os.rename(target, aside)
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _open_to_umask(folder: Path) -> None:
    """Give folder and files the user's ordinary permissions: mkdtemp and safetensors make theirs private."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
