causal
all
window(256)
recent(4096)
causal & recent(512)
causal & (recent(512) | first(128))
causal & block(256)
window(256) | global(2)
blocks(128, window(1) | global(1))
blocks(128, window(1) | random(3, seed = 7))
causal & strided(2)
causal | first(1024)
causal  # n: 4096
causal  # n: 4200
causal & recent(1024)  # n: 65536
causal & recent(1024) # n: 1048576
window(64)  # n: 64
strided(8)  # n: 8
q // 300 == k // 300
within(doc, causal & recent(4))  # inputs: doc
causal & same(doc) & q.chosen  # inputs: doc chosen
