random(1) at (q, k, N = N - 5)  # n: 4
