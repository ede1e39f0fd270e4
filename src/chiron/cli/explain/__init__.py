"""``chiron explain``."""
