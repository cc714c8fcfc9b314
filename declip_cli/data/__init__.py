"""From the user's disk to a Batch."""
