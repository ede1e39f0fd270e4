"""Whose turn it is in a queue."""
