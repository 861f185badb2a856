"""Processes that follow a run, read its files and feed wandb."""
