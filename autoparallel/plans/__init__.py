"""What a plan is made of: strategy, estimate, candidates; saved as JSON."""
