"""The gRPC peer and its client. No torch."""
