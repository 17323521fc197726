"""What makes this a paper artifact: the runner, claims, the report and the explorer."""
