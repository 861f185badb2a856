"""Processes that read a run and feed wandb."""
