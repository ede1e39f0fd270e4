"""The live driver of the control plane: one OpenAI-compatible endpoint before the engines."""
