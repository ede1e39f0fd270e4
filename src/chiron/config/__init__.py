"""Scenario files and serve configs: read strictly, and made into runs."""
