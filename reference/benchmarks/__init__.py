"""What a step costs; each file is a command that prints its table."""
