"""The simulator: the control plane under virtual time, before a model of the engines."""
