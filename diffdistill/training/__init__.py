"""The training loop, the run folder and its checkpoints."""
