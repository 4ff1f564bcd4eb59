"""Stands where vLLM would."""
