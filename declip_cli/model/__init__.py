"""From a Batch to Embeddings."""
