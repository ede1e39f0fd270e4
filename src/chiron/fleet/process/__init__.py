"""Instances as processes of this machine: the fleet, and what keeps an engine process in hand."""
