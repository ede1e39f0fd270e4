"""Durable batch jobs: the port, and SQLite behind it."""
