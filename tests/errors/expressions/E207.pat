causal[head]
