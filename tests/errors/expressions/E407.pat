isqrt(-4) < k
log2(0) < k
isqrt(q - k) < 3  # n: 64
q * q * q * q * q < k  # n: 1000000
