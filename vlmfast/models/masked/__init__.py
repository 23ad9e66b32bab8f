"""Models that predict masked words, and whether text and image match."""
