random(q % 4)
blocks(q + 1, random(2))  # n: 64
