"""The training loop: stages, epochs, trials, cross-validation and checkpoints."""
