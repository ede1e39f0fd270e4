"""``chiron top``."""
