"""What can be trained: the table, its settings, their JSON."""
