"""What is stored and sent: specs, keys, page objects, picture geometry, digests. No torch, no gRPC."""
