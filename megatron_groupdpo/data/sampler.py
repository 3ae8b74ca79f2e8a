"""Which groups each step trains on: a seeded order that depends on nothing but the seed and the store's length."""

from __future__ import annotations

import numpy as np


class GroupSampler:
    """Endless global order over ``num_groups`` groups, one seeded permutation per epoch.

    The only state is how many groups were consumed, so a run resumes under any layout.
    """

    def __init__(self, num_groups: int, *, seed: int, shuffle: bool = True) -> None:
        assert num_groups > 0, "an empty store is refused when it is opened"
        self.num_groups = num_groups
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def take(self, consumed_groups: int, count: int) -> list[tuple[int, int]]:
        """(group id, epoch) of the ``count`` groups that follow the first ``consumed_groups``."""
        taken = []
        for position in range(consumed_groups, consumed_groups + count):
            epoch, index = divmod(position, self.num_groups)
            taken.append((int(self._order_of(epoch)[index]), epoch))
        return taken

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.arange(self.num_groups)
            if self.shuffle:
                self._order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.num_groups)
        return self._order
