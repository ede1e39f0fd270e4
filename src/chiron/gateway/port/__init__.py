"""What relays and the brain say to each other between processes: messages, and the wire that carries them."""
