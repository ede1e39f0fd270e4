"""``chiron demo``."""
