"""wandb: what a run is called there, and what it is given."""
