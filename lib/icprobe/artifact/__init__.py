"""What makes this the artifact of a paper: its claims and the pools that its notebooks compare."""
