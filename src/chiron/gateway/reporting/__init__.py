"""What the gateway says of itself: journal, event log, status, metrics, results."""
