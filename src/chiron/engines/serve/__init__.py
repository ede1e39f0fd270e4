"""Engine servers: processes that run or emulate a model behind an OpenAI-compatible endpoint."""
