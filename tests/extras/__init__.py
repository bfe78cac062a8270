"""What stands beside the optimizer: averages, grafting, initializers, schedules."""
