"""What every command does around its work: one message per user error, a non-zero exit on every rank."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_groupdpo.errors import UserError


def run_entry(work: Callable[[], None]) -> None:
    """Run ``work``; a :class:`UserError`, or a file that cannot be read or written, is printed without a traceback.

    Once per node, and every rank exits with 1.
    """
    try:
        work()
    except (UserError, OSError) as error:
        if _first_on_node(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        # Not sys.exit: other threads and process groups of a run that failed half-way must not hold the exit back.
        sys.stdout.flush()
        os._exit(1)


def _first_on_node(message: str) -> bool:
    """Whether no other rank of this launch has printed the message on this node."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return True
    # Names the launch: ids such as "none" and process ids are used again, not with the same start.
    launcher = psutil.Process(os.getppid())
    launch = (launcher.pid, launcher.create_time(), os.environ.get("TORCHELASTIC_RESTART_COUNT"))
    name = hashlib.sha256(f"{launch}|{message}".encode()).hexdigest()[:16]
    try:
        (Path(tempfile.gettempdir()) / f"groupdpo-error-{name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
