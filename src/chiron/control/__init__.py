"""The control plane: queues, dispatch, both autoscaling loops, instance lifecycle. No I/O, no clock of its own.

The simulator and the gateway drive this very code.
"""
