"""Parallel Graph Compile in worker processes, then SelectBestGraphFromCandidates. No torch."""
