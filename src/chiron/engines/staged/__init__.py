"""The staged engine: one model as a pipeline of stages, each a service with replicas of its own."""
