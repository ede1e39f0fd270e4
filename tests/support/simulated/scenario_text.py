"""A small scenario that tests change to their needs."""

SMALL = """
name = "small"
seeds = [1, 2]
compare = ["static"]

[classes.chat]
kind = "interactive"
ttft = "5s"
itl = "200ms"

[classes.batch]
kind = "batch"
deadline = "10m"

[models.llama]
instances = [{ profile = "llama-3.1-8b/a100/tp1" }]
max_instances = 4

[gpus]
a100 = 8

[[workload]]
model = "llama"
class = "chat"
generate = { kind = "poisson", rate = 4, duration = "1m", lengths = "sharegpt-300" }

[[batch_job]]
model = "llama"
class = "batch"
at = "10s"
requests = 50
lengths = { input = 200, output = { p50 = 50, p99 = 200 } }
"""
