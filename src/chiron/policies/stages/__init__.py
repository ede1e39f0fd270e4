"""Stage policies: how many replicas each stage of a pipeline has, below whatever decides about whole pipelines."""
