"""``python -m megatron_groupdpo.doctor``."""

import sys

from megatron_groupdpo.doctor.examine import main

sys.exit(main())
