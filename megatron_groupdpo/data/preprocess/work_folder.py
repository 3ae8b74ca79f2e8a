"""The folder that appears whole or not at all, and the journal from which a killed run goes on.

Beside the target ``DIR/NAME`` lies ``DIR/.NAME.partial`` while it is made: ``store/`` (what will be renamed),
``journal.json`` and ``lock``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_groupdpo.data.store.format import META
from megatron_groupdpo.errors import ConfigError, DataError


class Journal:
    """What a run has done, rewritten whole each time; safe against a kill at any moment."""

    def __init__(self, folder: Path) -> None:
        self._path = _work_of(folder) / "journal.json"

    def write(self, identity: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        """Replace the record. The files it speaks of must be on the disk already."""
        partial = self._path.with_suffix(".new")
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump({"identity": identity, "progress": progress}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, self._path)
        _to_disk(self._path.parent)

    def read(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(identity, progress) of an earlier run, or None where there is none."""
        try:
            record = json.loads(self._path.read_text(encoding="utf-8"))
            return record["identity"], record["progress"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def begun_at(target: Path) -> Journal:
    """The journal beside ``target``, whether a run left one or not."""
    return Journal(_folder_of(Path(os.path.abspath(target))))


def start_afresh(folder: Path) -> None:
    """Delete what an earlier run left."""
    (_work_of(folder) / "journal.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)


@contextmanager
def whole_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, renamed to ``target`` when the block ends without error.

    What a killed run left in it is still there: go on from its :class:`Journal`, or :func:`start_afresh`. After an
    error it stays only where there is a journal and bad data or options (DataError, ConfigError) are not the reason.

    Raises:
        DataError: ``target`` exists and ``overwrite`` is off, or it is not a token store; another run makes it at
            this moment; the disk fails.
    """
    target = Path(os.path.abspath(target))
    _check_target(target, overwrite)
    folder = _folder_of(target)
    work = _work_of(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(work, target)
        if (work / "replaced").exists() and not target.exists():  # killed between the two renames of _replace
            os.rename(work / "replaced", target)
            _check_target(target, overwrite)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be created ({error.strerror}); choose another --output") from None
    with lock:
        keep = False
        try:
            yield folder
            for path in folder.iterdir():
                _to_disk(path)
            _replace(folder, target, overwrite)
        except OSError as error:
            keep = Journal(folder).read() is not None
            left = f"what was done stays in {work}: run the same command again to go on" if keep else "nothing was kept"
            raise DataError(
                f"{target}: writing failed ({error.strerror or error}); {left}. Free space or correct the path"
            ) from error
        except (DataError, ConfigError):
            raise
        except BaseException:
            keep = Journal(folder).read() is not None
            raise
        finally:
            if not keep:
                shutil.rmtree(work, ignore_errors=True)


def _folder_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial") / "store"


def _work_of(folder: Path) -> Path:
    return folder.parent


def _lock(work: Path, target: Path) -> IO[bytes]:
    """The work folder, held until the stream is closed or the process ends."""
    while True:
        work.mkdir(exist_ok=True)
        try:
            stream = open(work / "lock", "wb")  # noqa: SIM115 - the caller closes it
        except FileNotFoundError:
            continue  # another run ended between the two lines
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise DataError(
                f"{target}: another run is making it now; wait for it, or choose another --output"
            ) from None
        except OSError:
            return stream  # a file system without locks
        try:
            if os.path.samestat(os.stat(work / "lock"), os.fstat(stream.fileno())):
                return stream
        except FileNotFoundError:
            pass
        stream.close()  # the run that held it deleted it


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not overwrite:
        raise DataError(f"{target}: exists already; pass --overwrite to replace it, or choose another --output")
    if not (target / META).is_file():
        raise DataError(f"{target}: --overwrite replaces token stores only, and this is none; choose another path")


def _replace(folder: Path, target: Path, overwrite: bool) -> None:
    _check_target(target, overwrite)  # another process may have finished first
    if target.exists():
        os.rename(target, _work_of(folder) / "replaced")
    os.rename(folder, target)
    _to_disk(target.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
