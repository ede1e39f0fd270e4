"""The OpenAI API besides the hot path: files, batches, models, health, and the admin routes."""

from chiron.gateway.api.app import make_app
from chiron.gateway.api.state import ApiLimits, ApiState, BatchWork

__all__ = ["ApiLimits", "ApiState", "BatchWork", "make_app"]
