"""Numbers beside their floors, for any data."""
