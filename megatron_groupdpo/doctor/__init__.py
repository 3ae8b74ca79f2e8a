"""What a machine has and what a run would use of it: ``python -m megatron_groupdpo.doctor``."""
