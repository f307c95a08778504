"""Numbers to a codebook: k-means in one dimension, exact where it can be. Knows no `nn.Module`.

`fit_codebook` and `fit_integer_codebook` are what other rooms call; the rest is beneath them.
"""
