"""Training: from batches to checkpoints."""
