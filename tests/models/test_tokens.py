"""One tokenisation for probing, gradients and fine-tuning."""

import pytest
from helpers import examples

from icprobe import models
from icprobe.models import packing


def test_the_same_ids_reach_every_consumer(tiny, tmp_path):
    """Probing, gradients and TRL's trainer read the same tokens and the same completion mask."""
    from trl import SFTConfig, SFTTrainer

    lm = tiny(bos=True)
    rows = examples(5)
    encoded = models.encode(lm, rows)
    table = models.training_rows(lm, rows)
    settings = SFTConfig(
        str(tmp_path), completion_only_loss=True, packing=False, max_length=512, use_cpu=True,
        bf16=False, report_to="none", per_device_train_batch_size=5, data_seed=0,
    )  # fmt: skip
    trainer = SFTTrainer(lm.model, settings, train_dataset=table, processing_class=lm.tokenizer)
    (batch,) = trainer.get_train_dataloader()
    trained = {}
    for ids, labels, real in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        trained[tuple(ids[real == 1].tolist())] = labels[labels != -100].tolist()
    for example in encoded:
        assert trained.pop((*lm.bos, *example.ids)) == list(example.completion)
        packs = packing.pack([example])
        assert packs.target.tolist() == list(example.completion)
        assert packs.ids[0].tolist() == list(example.ids[:-1])
    assert not trained


def test_tokens_never_span_a_join(tiny):
    lm = tiny()
    row = {"id": "a", "prompt": "one", "completion": "two"}
    encoded = models.encode(lm, [row])[0]
    assert lm.tokenizer.decode(encoded.prompt) == "one"
    assert lm.tokenizer.decode(encoded.completion) == "two"
    ids, mask = models.sequence(lm, encoded, models.text_ids(lm, "before"))
    assert lm.tokenizer.decode(ids) == "beforeonetwo"
    assert sum(mask) == len(encoded.completion)


def test_long_prompts_lose_their_beginning_but_completions_nothing(tiny):
    lm = tiny(bos=True)
    row = {"id": "long one", "prompt": "abcdefgh", "completion": " xyz"}
    with pytest.warns(UserWarning, match=r"1 of 1 prompts.*max_length=8.*'long one' lost 5"):
        encoded = models.encode(lm, [row], max_length=8)[0]
    assert lm.tokenizer.decode(encoded.prompt) == "fgh"
    assert encoded.truncated == 5
    assert len(models.sequence(lm, encoded)[0]) == 8
    with pytest.raises(ValueError, match="'long one': the completion has 4 tokens"):
        models.encode(lm, [row], max_length=4)
    with pytest.raises(ValueError, match="'long one': the completion has no tokens"):
        models.encode(lm, [row | {"completion": ""}])
