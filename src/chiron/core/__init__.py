"""Types, ports and the timer heap: what everything else agrees on. Standard library only."""
