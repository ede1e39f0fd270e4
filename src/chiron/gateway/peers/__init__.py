"""Several gateways: which of them leads, and how the others' relays reach its brain."""
