q % -4 == k
q // k == 3  # n: 64
strided(0)
causal & dilated(4, 0)
blocks(0, causal)
block(q)  # n: 64
strided(N // 100)  # n: 64
ceildiv(q, 0) == k
