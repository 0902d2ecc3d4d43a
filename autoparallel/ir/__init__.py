"""The nouns: the graph of a training step, symbolic dims, the cluster. No torch."""
