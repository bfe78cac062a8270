"""What goes well with K-FAC and does not depend on it."""
