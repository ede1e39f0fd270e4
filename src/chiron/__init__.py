"""Chiron: SLO-aware, hierarchical autoscaling for LLM serving."""
