"""Workloads: traces read, generated, cut, scaled, mixed; batch jobs added. Columns of numpy, sorted by arrival."""
