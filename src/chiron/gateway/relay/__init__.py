"""Between clients and engines: requests are read, checked, sent on and answered here."""
