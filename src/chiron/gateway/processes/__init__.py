"""Relays as processes: what each runs, how they are made, and who sees to it that there are enough."""
