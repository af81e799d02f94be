"""Weights that are not the softmax of query times key: kernels of features, and logits that no key takes part in.

`features` makes the features of queries and keys, `linear` attends through them in linear time, `synthesize` makes
logits from the queries or from nothing. Which words of the language mean which of these is not said here.
"""
