"""One batch: its gradient, its statistics, exact products; and the factors."""
