"""One assembly of clock, fleet, engines, journal and control plane: for simulator, emulation and gateway."""
