"""The paths of KV through this process: fetch, restore, publish. No sglang, no gRPC by name."""
