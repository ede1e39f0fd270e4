"""Who gets an engine's next step: what rivals that compose batches share."""
