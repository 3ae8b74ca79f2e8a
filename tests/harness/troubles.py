"""Ways a rank can go wrong. No import of torch: the pools that run them start in no time."""

from __future__ import annotations

import os
import time


def fail_on_rank_1_while_others_wait() -> None:
    if os.environ["RANK"] == "1":
        raise ArithmeticError("seen on rank 1 alone")
    time.sleep(600)


def die_on_rank_0() -> None:
    if os.environ["RANK"] == "0":
        os._exit(7)


def sleep() -> None:
    time.sleep(600)


def environment(name: str) -> str:
    return os.environ[name]
