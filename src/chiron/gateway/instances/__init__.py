"""The instances behind the gateway: made, watched and scraped."""
