"""From any source to shards: `declip prepare`."""
