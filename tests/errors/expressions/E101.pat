causal && window(4)
causal || window(4)
q = k
!causal
causal & (window(4) | strided(8)
causal & window(4))
causal &
causal window(4)
same("doc")
1 + ~causal
k in 0:4
causal & windöw(4)
window(4 left = 3)
window(4, )
k in [0, 4]
window(4)(3)
causal & | all
causal if q < 4 else all
q <= 3 ? causal
q ≤ k
causal ∧ window(4)
k < 3 <> q
strided(8) { k < 4 }
# nothing but a comment
k - - * 3
(causal
window(4, 3
k in {0, 4
random(3; seed = 4)
q in 0…4
causal at (q)
causal at q
causal at (q & k)
(causal at k) & all
window(1e3)
window(1e99)
window(0x10)
4k < q
window(1__0)
