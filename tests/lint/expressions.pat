causal & k < q
causal & columns(64, 8)
q > k + 3  # n: 100
none
causal & k % 7 == 3  # n: 300
causal & recent(256)  # n: 260
all  # n: 4100
causal & (recent(200) | window(100))
causal & strided(64)
causal & strided(256)  # n: 65536
dilated(64, 8)
recent(64)
causal & recent(256) | q < 4
causal & (recent(256) | random(16, seed = 1))  # n: 512
random(16, seed = 1, avoid = k > 8)  # n: 256
causal & (recent(256) | random(4, seed = 1, avoid = ~causal | recent(256)))
