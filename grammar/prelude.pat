# The standard library, in the language itself: 0-based positions, half-open ranges.
# The compiler knows none of these names; what it recognises is the arithmetic behind them.

all = 0 == 0
none = 0 != 0
causal = k <= q                                      # a query sees itself and what came before

window(w) = abs(q - k) <= w                          # w tokens on each side, and itself
window(left, right) = -right <= q - k <= left        # left tokens back, right tokens ahead, and itself
recent(n) = 0 <= q - k < n                           # the last n tokens, itself counted
block(b) = q // b == k // b                          # own block of b tokens
strided(s) = (q - k) % s == 0                        # every s-th token, both ways
dilated(w, d) = strided(d) & window(w * d)           # w steps of d tokens on each side
columns(s, c) = k % s >= s - c                       # the last c tokens of every s: summary columns
first(g) = k < g                                     # the first g tokens as keys
global(g) = q < g | k < g                            # the first g tokens, as queries and as keys

same(a) = q.a == k.a                                 # equal value of an attribute
within(a, R) = same(a) & R at (q - q.a.start, k - k.a.start)          # R between positions of one value, each counted from its run

blocks(b, R) = R at (q // b, k // b, Nq = ceildiv(Nq, b), Nk = ceildiv(Nk, b))   # R between blocks of b tokens
transpose(R) = R at (k, q, Nq = Nk, Nk = Nq)         # queries and keys change places
shifted(R, d) = R at (q, k + d)                      # R as seen d tokens further on

# sorted by (label, position) and cut into chunks of m: own chunk and `back` chunks before it
chunks(label, m, back) = 0 <= q.label.rank // m - k.label.rank // m <= back
