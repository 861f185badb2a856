"""How all figures look, and those that every training or sampler has."""
