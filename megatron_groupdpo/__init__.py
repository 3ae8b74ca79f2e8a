"""GroupDPO (arXiv 2604.15602) on Megatron-Core: group-wise preference training with decoupled backward passes."""

__version__ = "0.1.0"
