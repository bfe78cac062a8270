"""The front for existing programs, and the numbers of the published release."""
