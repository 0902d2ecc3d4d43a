"""Text for people: explain."""
