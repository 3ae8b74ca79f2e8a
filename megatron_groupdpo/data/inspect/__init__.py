"""Looking into token stores and record files: statistics, warnings, single groups, digests."""
