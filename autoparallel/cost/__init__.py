"""Graph + cost table -> times and bytes. No torch."""
