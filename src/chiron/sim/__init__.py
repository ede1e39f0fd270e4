"""The simulator: the control plane under virtual time, in front of a model of the engines."""
