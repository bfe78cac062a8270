"""What reads jaxprs."""
