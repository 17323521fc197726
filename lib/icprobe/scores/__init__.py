"""What is scored, where the scores are kept, and where they are computed."""
