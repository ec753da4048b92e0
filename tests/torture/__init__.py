"""Nothing is lost: kills, flipped bits and damaged files, by the hundred. Each module runs by itself, in full; the suite runs a sample."""
