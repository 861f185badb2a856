"""Proofs that this machine and its cluster are fit."""
