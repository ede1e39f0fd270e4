"""An open-loop load generator against any OpenAI-compatible endpoint."""
