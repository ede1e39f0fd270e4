"""Rivals that decide who is served next, where, and in which step."""
