"""What is gathered from one batch, and exact products."""
