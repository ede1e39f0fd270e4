"""Pure policies: what Chiron and its rivals differ in."""
