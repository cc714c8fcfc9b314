"""Tar shards on disk or behind a URL, read by number."""
