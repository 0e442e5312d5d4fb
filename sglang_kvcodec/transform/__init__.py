"""Stages that turn KV into 8-bit canvases and back: torch references that define the format."""
