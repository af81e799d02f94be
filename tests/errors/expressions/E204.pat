recent()
causal & recent
causal(4)
window(lft = 1, right = 2)
window(left = 1, left = 2)
clamp(q, 3) < k
abs(x = q) < k
min < k
random(seed = 3)
random(3, sead = 3)
causal at (q, k, M = 3)
q(3) < k
random(1, 2, none, 3)
ceildiv(q) == k
blocks(4)
blocks(4, R = all, b = 4)
