"""What makes this a paper's artifact: runs, claims, reports and benchmarks."""
