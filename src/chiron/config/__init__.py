"""Scenario files and serve configs: read strictly, and turned into runs."""
