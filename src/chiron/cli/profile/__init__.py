"""``chiron profile``."""
