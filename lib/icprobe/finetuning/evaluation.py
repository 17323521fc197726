"""How good a model is on held-out queries: likelihood, choice among options, its own answers.

One number per query and measure, higher = better:

- nats_per_token: log-likelihood of the completion over its number of tokens;
- correct: 1 where of all options the completion is the likeliest (its log-likelihood the highest),
  else 0; for closed questions, those with options;
- exact_match and rouge_l: of the greedy answer (its first line) with the completion, SQuAD's exact
  match (1 or 0, without case, punctuation and articles; Rajpurkar et al. 2016) and the F-measure of
  ROUGE-L (Lin 2004), both as torchmetrics has them; for the other, open questions.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig, StoppingCriteriaList

from icprobe import models
from icprobe.models import LM, Encoded

MEASURES = {
    "nats_per_token": "log-likelihood (nats per token)",
    "correct": "closed questions: accuracy",
    "exact_match": "open questions: exact match",
    "rouge_l": "open questions: ROUGE-L",
}
VERSION = 1  # raise it when the same model begins to get other numbers

ANSWER_TOKENS = 24  # most tokens of an answer; the suites' completions have 7 on average
ANSWERS_AT_ONCE = 64  # answers written at once: each step reads all weights, however many answers


def evaluate(
    lm: LM,
    queries: Iterable[dict],
    max_length: int | None = None,
    n_answered: int | None = None,
    answer_tokens: int = ANSWER_TOKENS,
) -> pd.DataFrame:
    """Return the measures of Q queries (id, prompt, completion, and options or None) by id.

    Columns are `MEASURES`, not a number where a measure does not apply, or was not asked for; and
    answer, the text generated, or None. Answers are generated to the first n_answered open
    questions (all by default), of at most answer_tokens; only the first line counts, unless a
    completion has several. Raises what `models.log_likelihoods` does.
    """
    queries = list(queries)
    encoded = models.encode(lm, queries, max_length)
    nats = models.log_likelihoods(lm, encoded)[0]
    tokens = [len(query.completion) for query in encoded]
    found = pd.DataFrame(np.nan, index=[query["id"] for query in queries], columns=list(MEASURES))
    found["nats_per_token"], found["answer"] = nats / tokens, None
    closed = [query for query in queries if query["options"]]
    found.loc[[query["id"] for query in closed], "correct"] = _chosen_right(lm, closed, max_length)
    open_ones = [k for k, query in enumerate(queries) if not query["options"]][:n_answered]
    lines = any("\n" in query["completion"].strip() for query in queries)
    texts = answers(lm, [encoded[k] for k in open_ones], answer_tokens, lines)
    for k, answer in zip(open_ones, texts, strict=True):
        scores = {**_compared(answer, queries[k]["completion"]), "answer": answer}
        found.loc[queries[k]["id"], list(scores)] = list(scores.values())
    return found


def _chosen_right(lm: LM, queries: Sequence[dict], max_length: int | None) -> list[float]:
    """Return, for queries with options, 1 where their completion is the likeliest of them."""
    if not queries:
        return []
    rows = [
        {"id": f"{query['id']}, option {k}", "prompt": query["prompt"], "completion": option}
        for query in queries
        for k, option in enumerate(query["options"])
    ]
    nats = models.log_likelihoods(lm, models.encode(lm, rows, max_length))[0]
    of_query = np.split(nats, np.cumsum([len(query["options"]) for query in queries])[:-1])
    return [
        float(query["options"][int(mine.argmax())] == query["completion"])
        for query, mine in zip(queries, of_query, strict=True)
    ]


@torch.inference_mode()
def answers(
    lm: LM,
    queries: Sequence[Encoded],
    new_tokens: int = ANSWER_TOKENS,
    several_lines: bool = False,
) -> list[str]:
    """Return the model's greedy answer to each of Q prompts, of so many new tokens at most."""
    found = {}
    order = sorted(range(len(queries)), key=lambda k: len(queries[k].prompt))
    for start in range(0, len(order), ANSWERS_AT_ONCE):
        batch = order[start : start + ANSWERS_AT_ONCE]
        prompts = [[*lm.bos, *queries[k].prompt] for k in batch]
        for k, text in zip(batch, _written(lm, prompts, new_tokens, several_lines), strict=True):
            found[k] = text.strip() if several_lines else text.strip().partition("\n")[0].strip()
    return [found[k] for k in range(len(queries))]


def _written(lm: LM, prompts: list[list[int]], new_tokens: int, several_lines: bool) -> list[str]:
    """Return what the model writes after prompts that are read together, padded at the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    end = lm.tokenizer.eos_token_id

    def first_line_ended(ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        texts = lm.tokenizer.batch_decode(ids[:, longest:])
        ended = ["\n" in text.lstrip() for text in texts]  # not by an empty line before it
        return torch.tensor(ended, device=ids.device)

    # greedy, and no more: what a model's own settings ask for would be filled in
    own, lm.model.generation_config = lm.model.generation_config, GenerationConfig()
    try:
        written = lm.model.generate(
            input_ids=ids.to(lm.device),
            attention_mask=real.to(lm.device),
            generation_config=GenerationConfig(
                max_new_tokens=new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end or 0
            ),
            stopping_criteria=StoppingCriteriaList([] if several_lines else [first_line_ended]),
        )
    finally:
        lm.model.generation_config = own
    return lm.tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)


def _compared(answer: str, completion: str) -> dict[str, float]:
    """Return exact match and ROUGE-L of an answer."""
    from torchmetrics.functional.text import rouge_score, squad  # slow to import

    reference = {"answers": {"answer_start": [0], "text": [completion.strip()]}, "id": "0"}
    matched = squad([{"prediction_text": answer, "id": "0"}], [reference])["exact_match"]
    overlap = rouge_score(answer, completion.strip(), rouge_keys="rougeL")["rougeL_fmeasure"]
    return {"exact_match": float(matched) / 100, "rouge_l": float(overlap)}


def by_task(results: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """Return means of `evaluate` over the queries of each of tasks [Q], and over all at last."""
    results = results[list(MEASURES)]
    table = results.groupby(np.asarray(tasks), sort=False).mean()
    return pd.concat([table, results.mean().to_frame("all").T])
