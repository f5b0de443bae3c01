"""A run and its folder: config, scales, set-up, ranks, checkpoints, journal, memory plan."""
