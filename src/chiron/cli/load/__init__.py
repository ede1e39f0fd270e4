"""``chiron load``."""
