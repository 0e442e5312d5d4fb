"""Fuzzing of what comes from outside: parsers in this process, a real peer over gRPC. ``scripts/fuzz`` runs it."""
