causal & 3
blocks(4, 3)
q - k
causal == window(4)
causal - 1
q < 4 & k
~q
causal at (q, causal)
k in {0, causal}
abs(causal) < 3
random(causal)
random(1, avoid = 3)
-causal
min(q, causal) < k
window(4) | blocks(2, q)
k < 0.5 * q
q / 4 == k / 4
q ** 2 < k
