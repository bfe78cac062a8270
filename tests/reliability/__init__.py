"""What is promised when something goes wrong: docs/reliability.md."""
