"""Fleets: where instances come from."""
