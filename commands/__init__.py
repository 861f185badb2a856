"""The commands of launch.py, which put jobs and the places where they run together. They import no torch."""
