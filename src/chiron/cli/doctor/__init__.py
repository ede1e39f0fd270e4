"""``chiron doctor``."""
