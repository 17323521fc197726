"""Synthetic linear regression: what a demonstration and a training step do, both exactly.

A task is a vector w; its pairs are x with label y = w . x + noise. A learner reads a context S of
pairs and predicts the labels of queries. The loss of a query is half its squared error,

    L_q = (y_q - prediction_q)^2 / 2,

and, as with language models, positive helps:

    gain_iq = L_q(S) - L_q(S, i)             in-context probing: example i joins the context
    T_iq    = <grad L_i(w), grad L_q(w)>     TracIn, = r_i r_q x_i . x_q with residuals r at w

B tasks, N training examples, M queries, K pairs of a context, D dimensions, R contexts read
together. All is batched over tasks, in float64 but for what a network computes.
"""
