"""As ``ancestor.py``, for ranks with Transformer Engine's own Python (te_runtime.py)."""

from __future__ import annotations

import te_runtime

te_runtime.become_ancestor(te_runtime.BLACKWELL)
