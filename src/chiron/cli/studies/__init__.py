"""Commands that run many simulations to answer one question."""
