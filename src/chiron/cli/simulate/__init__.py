"""``chiron simulate``, ``compare``, ``bound``, ``scenarios``, ``policies``."""
