"""Numbers and tokens as people read them."""

import numpy as np
import pandas as pd

from icprobe.figures import tables


class Letters:
    """A tokenizer of letters."""

    @staticmethod
    def decode(ids):
        return "".join(map(chr, ids))


def test_columns_have_the_digits_of_their_kind():
    frame = pd.DataFrame({
        "condition": ["same task", "neither"],
        "estimate": [0.416, np.nan],
        "rankings": [48.0, np.nan],
        "p": [0.00042, 0.5],
        "pairs": [1920, 7],
    })  # fmt: skip
    shown = tables.wrapped(frame).data
    for text in (">0.42<", ">48<", ">0.0004<", ">0.5000<", ">1920<", ">–<", ">same task<"):
        assert text in shown
    assert "nan" not in shown


def test_texts_are_no_html():
    shown = tables.wrapped(pd.DataFrame({"<b>": ["<i>"]}, index=["<u>"])).data
    assert not any(text in shown for text in ("<b>", "<i>", "<u>"))


def test_completion_tokens_carry_their_values():
    ids, mask = [*map(ord, "a<bc")], [0, 0, 1, 1]
    shown = tables.token_values(Letters, ids, mask, np.array([-1.0, -0.5]), "title").data
    assert "-1.50 nats" in shown and ">a&lt;</pre>" in shown
    assert ">b<br><small>-1.00<" in shown and ">c<br><small>-0.50<" in shown
    shown = tables.trained_tokens(Letters, ids, [-100, -100, ord("b"), ord("c")]).data
    assert "2 of 4 tokens" in shown and shown.count("font-weight:bold") == 2
