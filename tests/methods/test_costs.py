"""Operation counts against PyTorch's own counter, and where costs cross."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from icprobe import models
from icprobe.methods import costs, hidden_states
from icprobe.methods.costs import Lengths, Shape
from icprobe.methods.gradient import linear_layers, losses, mean_influence, projected_gradients

PROMPTS = ("A cat sat", "A cat ran off", "Two dogs")
ROWS = [
    {"id": str(k), "prompt": prompt, "completion": " yes" if k % 2 else " no, not so"}
    for k, prompt in enumerate(PROMPTS)
]


@pytest.fixture(params=["llama", "gpt_neox"])
def work(tiny, request):
    """Return a model, its shape, two training examples and three queries.

    Attention is free in this shape: the counter takes all pairs of tokens, also masked ones.
    """
    lm = tiny(request.param)
    encoded = models.encode(lm, ROWS)
    return lm, replace(Shape.of(lm), attention=0), encoded[:2], encoded


def from_embeddings(lm, shape):
    """Return the weights that read embeddings: no gradient and no tangent goes through them."""
    parallel = lm.model.config.model_type == "gpt_neox"  # attention and MLP read the same
    groups = [shape.groups[0], *([shape.groups[2]] if parallel else [])]
    return sum(d_in * sum(d_outs) for d_in, d_outs in groups)


def counted(function, batched=True):
    """Return the operations of matrix products, without those inside fused attention."""
    more = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # it lacks this
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        function()
    of = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    return sum(
        count for name, count in of.items() if "mm" in name and (batched or "bmm" not in name)
    )


def test_probing_pair_by_pair_takes_what_pytorch_counts(work):
    lm, shape, train, queries = work

    def every_pair():
        with torch.inference_mode(), models.selective_head(lm):
            for shown, query in itertools.product(train, queries):
                ids, mask = models.sequence(lm, query, shown.ids)
                columns = torch.tensor(mask[1:]).nonzero()[:, 0]
                ids = torch.tensor([ids[:-1]])
                models.logits_at(lm, torch.zeros_like(columns), columns, input_ids=ids)

    lengths = Lengths.of(train, queries)
    expected = costs.probing(shape, lengths, sharing=False).operations
    assert counted(every_pair) == expected


@pytest.mark.parametrize("loss_on", ["completion", "text"])
def test_gradients_of_the_models_size_take_what_pytorch_counts(work, loss_on):
    lm, shape, train, queries = work
    weights = [layer.weight for layer in linear_layers(lm).values()]
    weights.append(lm.model.get_input_embeddings().weight)  # so that the first block passes it on
    measured = counted(
        lambda: [
            *(losses.full_gradient(lm, example, weights, loss_on) for example in train),
            *(losses.full_gradient(lm, query, weights) for query in queries),
        ]
    )
    products = 2 * shape.weights * len(train) * len(queries)
    lengths = Lengths.of(train, queries, loss_on)
    expected = costs.whole_gradients(shape, lengths)
    assert measured == expected.operations - products


def test_sharing_reads_every_beginning_once():
    shape = Shape(((3, (5,)),), head=7, attention=2, cache=4)
    queries = [
        models.Encoded("a", (1, 2), (3, 4)),
        models.Encoded("b", (1, 2), (5,)),
    ]
    lengths = Lengths.of([models.Encoded("t", (8, 9), (10,))], queries)
    assert (lengths.distinct, lengths.attended_keys) == (3, 6)  # 1, 12, 123
    # demonstration: 3 tokens, then 3 more; keys: 6 + 9 + 6; head: 3
    expected = 2 * 15 * 6 + 4 * 2 * 21 + 2 * 7 * 3
    assert costs.probing(shape, lengths).operations == expected
    assert costs.probing(shape, lengths).bytes == 4 * 4 * 3


def test_products_go_the_cheaper_way():
    shape = Shape(((100, (60, 40)),), head=0, attention=0, cache=0)

    def products(tokens):
        lengths = Lengths(
            np.array([tokens]), np.array([1]), np.array([tokens]), np.array([1]), tokens, 0
        )
        return costs.gradient_products(shape, lengths).operations - 2 * 2 * 2 * 10**4 * tokens

    assert products(2) == 2 * 2 * 2 * 200  # over four pairs of tokens, inputs once
    assert products(1000) == 2 * (2000 + 1) * 10**4  # over weights


def test_layers_that_read_one_input_are_a_group(tiny):
    lm = tiny("llama")
    shape, config = Shape.of(lm), lm.model.config
    hidden, inner, count = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads = hidden // config.num_attention_heads * config.num_key_value_heads
    block = [
        (hidden, (hidden, heads, heads)),  # queries, keys, values
        (hidden, (hidden,)),
        (hidden, (inner, inner)),
        (inner, (hidden,)),
    ]
    assert shape.groups == tuple(block * count)
    assert (shape.attention, shape.cache) == (hidden * count, 2 * heads * count)
    assert shape.weights == sum(layer.weight.numel() for layer in linear_layers(lm).values())


def test_reading_takes_what_pytorch_counts(work):
    lm, shape, train, queries = work
    blocks = lm.model.config.num_hidden_layers
    expected = costs.reading(shape, Lengths.of(train, queries)).operations
    expected *= blocks // 2 / (blocks / 2)  # of an odd number, the smaller half
    # mean_states pads, so each text by itself
    measured = counted(lambda: [hidden_states.mean_states(lm, [one]) for one in (*train, *queries)])
    assert measured == pytest.approx(expected)


@pytest.mark.parametrize("loss_on", ["completion", "text"])
def test_forward_mode_takes_what_pytorch_counts(work, loss_on, monkeypatch):
    lm, shape, train, queries = work
    monkeypatch.setitem(losses.TOKENS_PER_PASS, "cpu", 1)  # no padding

    def every_one():
        mean_influence(lm, train, queries[:1], loss_on=loss_on)

    lengths = Lengths.of(train, queries[:1], loss_on)
    expected = costs.query_set(shape, lengths).operations
    tokens = lengths.train.sum() + lengths.queries.sum()
    expected -= 2 * from_embeddings(lm, shape) * tokens
    assert counted(every_one, batched=False) == expected  # attention is not fused there


def test_projections_take_what_pytorch_counts(work):
    lm, shape, train, queries = work
    size = 2
    measured = counted(
        lambda: [projected_gradients(lm, [one], [size]) for one in (*train, *queries)]
    )
    lengths = Lengths.of(train, queries)
    entries = sum(size * size * len(d_outs) for _, d_outs in shape.groups)
    products = 2 * entries * len(train) * len(queries)
    least = costs.projected(shape, lengths, size).operations - products
    # each layer has a matrix of its own for an input that it shares: that is more than the least
    again = sum(d_in * (len(d_outs) - 1) for d_in, d_outs in shape.groups)
    tokens = lengths.train.sum() + lengths.queries.sum()
    least -= 2 * from_embeddings(lm, shape) * tokens
    assert measured == least + 2 * size * again * tokens


def test_curves_are_the_costs_of_the_first_queries(work):
    _, shape, train, queries = work
    table = costs.by_queries(shape, train, queries, [1, 3]).set_index(["method", "m"])
    for m in (1, 3):
        expected = costs.probing(shape, Lengths.of(train, queries[:m]))
        assert tuple(table.loc[("probing", m)]) == expected
        operations = table["operations"].xs(m, level="m")
        assert operations["probing, nothing shared"] >= operations["probing"]
        assert operations["gradient products"] <= operations["gradients of the model's size"]
