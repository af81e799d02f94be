random(N - 65)  # n: 64
