"""In-context probing for data attribution.

Every attribution method here answers with the same object: a float32 matrix [N, M], one row per
training example in the order given, one column per query. Positive always means that the training
example helps: it makes the query's completion likelier. Log-likelihoods are in nats.

Letters used in every docstring:

    N   training examples (demonstrations)
    M   queries
    T   tokens of one sequence
    V   vocabulary size
    H   hidden size
    P   parameters
"""

__version__ = "0.1.0"
