"""The part of the gateway that decides: who may wait, where a request runs, and what is counted of it."""
