"""Instances on a Ray cluster: engines in detached actors, each in a placement group of its own."""
