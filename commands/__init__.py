"""The commands of launch.py, which put jobs and the places where they run together. No torch on the way."""
