"""What happened: results, event log, reports."""
