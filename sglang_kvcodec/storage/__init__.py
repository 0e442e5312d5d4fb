"""Storage engines of a peer. No torch."""
