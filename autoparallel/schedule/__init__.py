"""Actions per rank, and a simulator of their timeline."""
