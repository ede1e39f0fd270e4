"""Rival policies, through the same hooks as ours. A new rival is one file."""
