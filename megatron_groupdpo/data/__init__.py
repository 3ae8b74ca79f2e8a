"""From files of groups to microbatches: records, token store, sampler, planner."""
