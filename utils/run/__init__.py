"""A run's surroundings: errors, device and random streams, distributed processes, files, checkpoints, log."""
