"""Models in and out: sources, checkpoints and exports."""
