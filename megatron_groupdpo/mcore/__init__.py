"""Everything that touches Megatron-Core; the only folder that imports megatron."""

import logging
import warnings

# Importing Megatron warns, module by module, that Transformer Engine and Apex are absent, and torch's extension
# builder that there is no CUDA; `python -m megatron_groupdpo.doctor` says so once, with what it means.
for _what in ("Transformer Engine and Apex are not installed", "Apex is not installed", ".* is experimental"):
    warnings.filterwarnings("ignore", message=_what, category=UserWarning)
for _what in ("Setting CUDA_DEVICE_MAX_CONNECTIONS", "Could not determine rank", ".*CUDA_DEVICE_MAX_CONNECTIONS"):
    warnings.filterwarnings("ignore", message=_what, category=UserWarning)
warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)
# Loading a checkpoint: what torch's own loader says of the calls Megatron makes.
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\..*")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
