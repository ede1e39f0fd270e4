"""Many simulations that answer one question: settings that are tuned, grids that are compared, fleets that are planned.

A study makes ``Trial``s, a ``Runner`` has an executor simulate those that its journal does not know yet, and what comes
out is the same whoever simulates: this process, processes on this machine, or a Ray cluster.
"""
