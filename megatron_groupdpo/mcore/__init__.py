"""Everything that touches Megatron-Core; the only folder that imports megatron."""

import logging
import re
import warnings

# What a user can do nothing about, each by its whole message: another one of the same place is shown.
_WARNED: dict[type[Warning], tuple[str, ...]] = {
    UserWarning: (
        # Megatron's modules, one by one, as they are imported where Transformer Engine and Apex are absent:
        # `python -m megatron_groupdpo.doctor` says so once, with what it means.
        "Transformer Engine and Apex are not installed. Falling back to Torch optimizers.",
        "Transformer Engine and Apex are not installed. Falling back to local implementations of "
        "multi_tensor_applier and multi_tensor_scale",
        "Transformer Engine and Apex are not installed. Falling back to local implementations of "
        "multi_tensor_applier, multi_tensor_l2norm, and multi_tensor_scale",
        "Apex is not installed. Falling back to Torch Norm",
        # A class of Megatron's that is defined with the others and not used.
        "MimoModelConfig is experimental and still under active development. "
        "The API may change without notice in future releases.",
        # Calls of Megatron's to torch's loader: metadata is read by each process for itself; a load is called by the
        # older order of arguments.
        "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single "
        "process.",
        "The argument order of load has been changed. Please check the document to avoid future breakages.",
    ),
    # The class that Megatron's checkpoints are made of.
    FutureWarning: ("Please use DTensor instead and we are deprecating ShardedTensor.",),
}
for _category, _messages in _WARNED.items():
    for _message in _messages:
        warnings.filterwarnings("ignore", message=re.escape(_message) + r"\Z", category=_category)

_LOGGED = {
    # A CUDA toolkit without a GPU; the device of a run is in its first line.
    "torch.utils.cpp_extension": "No CUDA runtime is found, using CUDA_HOME='%s'",
    # Megatron's save that waits goes through its asynchronous one, by a name that it deprecates itself.
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated and will be removed in the "
    "future releases. Please, use NVRx async solution by setting `async_strategy` to `nvrx`.",
    # The layout that is computed there is the one that a caller would compute.
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided "
    "with use_distributed_optimizer=True. Auto-computing layout inside DDP. Callers should pre-compute layouts via "
    "DistributedOptimizer.compute_full_param_layout() and pass them in.",
}
for _logger, _text in _LOGGED.items():
    logging.getLogger(_logger).addFilter(lambda record, text=_text: record.msg != text)
