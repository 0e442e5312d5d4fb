"""The kvcodec command."""
