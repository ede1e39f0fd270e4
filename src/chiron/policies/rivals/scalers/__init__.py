"""Rivals that decide how many instances there are."""
