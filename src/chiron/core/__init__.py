"""Types, ports and the timer heap, used by everything else. Standard library only."""
