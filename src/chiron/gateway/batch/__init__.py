"""Batch items on their way from the store through the control plane, and their results back."""
