causal & windw(4)
causal & zebra
causal & zebra(4)
blocks(4, k == n - 1)
causal & true
q_idx >= kv_idx
window(3) & K < 4
