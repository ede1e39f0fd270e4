"""The live driver of the control plane: one OpenAI-compatible endpoint in front of the engines."""
