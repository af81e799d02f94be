"""What can be said of a pattern before it runs? Counts, costs, proofs, cache policy and reach, without PyTorch."""
