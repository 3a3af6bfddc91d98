"""Prompts and completions of instruction data sets: columns, formats, tokens."""

import pytest
from datasets import Dataset

from hf_tfm.data.instructions import (
    CHAT_TEMPLATE,
    demonstration_rows,
    is_demonstration,
    is_ranking,
    pairs_of,
    ranking_lengths,
    ranking_rows,
    split_pairs,
    tokenize_demonstrations,
    tokenize_rankings,
)
from hf_tfm.data.vocabulary import train_bytes

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bytes(["Below is an instruction"], 258)


def trained_text(rows, tokenizer, prompt_format="plain"):
    """The prompts and the completions of the first row, as the model reads them."""
    row = tokenize_demonstrations(demonstration_rows(rows), tokenizer, prompt_format, 1000)[0]
    sides = [[i for i, one in zip(row["input_ids"], row["completion_mask"], strict=True) if one == k] for k in (0, 1)]
    return tuple(tokenizer.decode(side) for side in sides)


END = "<|endoftext|>"
CHAT = "<|user|>\nDouble.\n\n2\n<|assistant|>\n"
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nDouble.\n\n### Input:\n2\n\n"
    "### Response:\n"
)


@pytest.mark.parametrize(
    ("row", "prompt_format", "prompt", "completion"),
    [
        ({"prompt": "2 + 2 =", "completion": " 4"}, "plain", "2 + 2 =", " 4" + END),
        ({"instruction": "Double.", "input": "2", "output": "4"}, "plain", "Double.\n\n2\n\n", "4" + END),
        ({"instruction": "Double.", "input": "2", "output": "4"}, "alpaca", ALPACA, "4" + END),
        ({"instruction": "Double.", "input": "2", "response": "4"}, "chat", CHAT, f"4{END}\n"),
        (
            {"messages": TALK},
            "plain",
            "<|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\n<|user|>\nBye\n<|assistant|>\n",
            f"Hello!{END}\nSee you.{END}\n",
        ),
        (
            {"prompt": TALK[1:2], "completion": TALK[2:3]},
            "plain",
            "<|user|>\nHi\n<|assistant|>\n",
            f"Hello!{END}\n",
        ),
    ],
)
def test_only_completions_are_trained_on(row, prompt_format, prompt, completion, tokenizer):
    assert trained_text(Dataset.from_list([row]), tokenizer, prompt_format) == (prompt, completion)


def test_alpaca_prompts_without_input(tokenizer):
    row = {"instruction": "Sing.", "input": "", "output": "La"}
    prompt, _ = trained_text(Dataset.from_list([row]), tokenizer, "alpaca")
    assert prompt.endswith("completes the request.\n\n### Instruction:\nSing.\n\n### Response:\n")
    assert "paired with" not in prompt


def test_rankings_and_pairs(tokenizer):
    rows = Dataset.from_list(
        [
            {"prompt": "p", "completions": ["a", "bb", "ccc"], "scores": [0.0, 1.0, 0.0]},
            {"prompt": "tie", "completions": ["a", "b", "c"], "scores": [1.0, 1.0, 1.0]},
        ]
    )
    found = tokenize_rankings(ranking_rows(rows), tokenizer, "plain", 10)
    assert len(found) == 1 and pairs_of(found[0]["scores"]) == [(1, 0), (1, 2)]
    assert ranking_lengths(found).tolist() == [1 + 3 + 1]
    pairs = split_pairs(found)
    decoded = [[tokenizer.decode(ids) for ids in row["completion_ids"]] for row in pairs]
    assert decoded == [["bb" + END, "a" + END], ["bb" + END, "ccc" + END]]


def test_preferences_of_texts_and_conversations_agree(tokenizer):
    other = [{"role": "assistant", "content": "What?"}]
    texts = Dataset.from_list([{"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}])
    implicit = Dataset.from_list([{"chosen": TALK[1:3], "rejected": TALK[1:2] + other}])
    explicit = Dataset.from_list([{"prompt": TALK[1:2], "chosen": TALK[2:3], "rejected": other}])
    found = [tokenize_rankings(ranking_rows(rows), tokenizer, "chat", 100)[0] for rows in (texts, implicit, explicit)]
    assert found[0] == found[1] == found[2]
    assert tokenizer.decode(found[0]["prompt_ids"]) == "<|user|>\nHi\n<|assistant|>\n"
    assert [tokenizer.decode(ids) for ids in found[0]["completion_ids"]] == [f"Hello!{END}\n", f"What?{END}\n"]


def test_long_rows_are_left_out(tokenizer):
    rows = demonstration_rows(Dataset.from_list([{"prompt": "p" * n, "completion": "c"} for n in (3, 4)]))
    assert len(tokenize_demonstrations(rows, tokenizer, "plain", 5)) == 1
    with pytest.raises(ValueError, match="all 2 rows are longer than max_length = 4 tokens"):
        tokenize_demonstrations(rows, tokenizer, "plain", 4)


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer):
    odd = train_bytes(["a"], 258)
    odd.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(ValueError, match="row 0: the chat template of the tokenizer does not render a longer"):
        tokenize_demonstrations(demonstration_rows(Dataset.from_list([{"messages": TALK}])), odd, "plain", 1000)


def test_columns_tell_the_kind_of_data():
    assert is_demonstration(["instruction", "output"]) and is_demonstration(["messages"])
    assert not is_demonstration(["prompt", "chosen", "rejected"])
    assert is_ranking(["chosen", "rejected"]) and is_ranking(["prompt", "completions", "scores"])
    assert not is_ranking(["prompt", "completion"])


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (demonstration_rows, {"text": "a"}, "prompt_column must be given: prompt or instruction is not a column"),
        (demonstration_rows, {"prompt": "a", "text": "b"}, "completion_column must be given: completion or output or"),
        (demonstration_rows, {"prompt": 1, "completion": "b"}, 'column "prompt" must hold texts, or lists of'),
        (ranking_rows, {"prompt": "a", "chosen": "b"}, "rejected_column must be given: rejected is not a column"),
    ],
)
def test_missing_columns_are_named(read, row, message):
    with pytest.raises(ValueError, match=message):
        read(Dataset.from_list([row]))


def test_a_row_without_text_is_named(tokenizer):
    rows = demonstration_rows(Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "a"}]))
    with pytest.raises(ValueError, match='column "completion" must hold a text or a conversation, got null in row 1'):
        tokenize_demonstrations(rows, tokenizer, "plain", 10)
