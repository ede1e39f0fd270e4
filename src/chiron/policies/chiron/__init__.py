"""Ours, the paper's design, and the clairvoyant schedule: what ``chiron`` is made of."""
