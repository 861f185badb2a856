"""Audits: stretches of a run are computed again, and compared with what the run has recorded."""
