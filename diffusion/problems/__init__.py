"""What can be learned: one file for each data set, which says all that is particular to it."""
