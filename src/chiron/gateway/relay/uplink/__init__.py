"""A relay whose brain is another process: its connection, what it knows, and what it does alone."""
