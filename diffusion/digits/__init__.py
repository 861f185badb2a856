"""What a classifier of digits says of digits."""
