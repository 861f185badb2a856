"""What a job does: train and sample; checkpoints, metrics, data order, run folders."""
