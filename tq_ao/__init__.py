"""Packed TurboQuant KV caches for transformers."""
