"""A diffusion process, its samplers, its randomness, and what a model of it is."""
