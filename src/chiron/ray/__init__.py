"""Chiron's fleet policies for those who keep Ray Serve: inside it, or beside it by its external scaler.

    AutoscalingPolicy(policy_function="chiron.ray:ServeAutoscaler", policy_kwargs={"profile": "llama-3.1-8b/a100/tp1"})

Nothing here imports Ray.
"""

from chiron.ray.autoscaler import ServeAutoscaler
from chiron.ray.external import ExternalScaler

__all__ = ["ExternalScaler", "ServeAutoscaler"]
