"""Engines: how requests are run. Here, the model of one, driven by the timer heap."""
