"""Whether the processes of a job live, and whether their GPUs compute what they should."""
