"""``chiron batch``."""
