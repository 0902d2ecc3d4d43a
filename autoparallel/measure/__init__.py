"""What this machine's device really does: timed operators and links in, a cost table of kind `measured` out."""
