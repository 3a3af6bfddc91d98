"""Prompts with completions, from any data set of instructions, preferences or rankings.

    rows -> segments (prompt, completion, prompt, completion ...) -> {"input_ids", "completion_mask"}
    rows -> prompt, completions and a score for each              -> {"prompt_ids", "completion_ids", "scores"}

The columns are those of trl: ``messages``; ``prompt`` and ``completion``; ``chosen`` and ``rejected``, with or without
``prompt``. Further ones are ``instruction``, ``input`` and ``output``, and ``prompt``, ``completions`` and ``scores``.
Prompts and completions are texts, or conversations: lists of messages {"role", "content"}.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, TypeAlias

import datasets
import numpy as np
from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from .csv_files import separator_hint, written
from .language import SpecialTokens
from .progress import show_progress_of

log = logging.getLogger(__name__)

PromptFormat = Literal["plain", "alpaca", "chat"]
Messages: TypeAlias = list[dict[str, str]]
Turn: TypeAlias = "str | Messages"  # a text or a conversation

ASSISTANT, USER = "assistant", "user"
PROMPTS, COMPLETIONS, OUTPUTS = ("prompt", "instruction"), ("completion", "output", "response"), "messages"
INPUT, CHOSEN, REJECTED, RANKED, SCORES = "input", "chosen", "rejected", "completions", "scores"

# For tokenizers that have none; the end token ends an answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# Taori et al. 2023, "Stanford Alpaca: An Instruction-following LLaMA model".
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)
ALPACA_CONTEXT = ", paired with an input that provides further context"

STRINGS = ("string", "large_string")
TOKENS = List(Value("int32"))
DEMONSTRATION = Features({"input_ids": TOKENS, "completion_mask": List(Value("int8"))})
RANKING = Features({"prompt_ids": TOKENS, "completion_ids": List(TOKENS), "scores": List(Value("float32"))})


def is_demonstration(columns: Collection[str]) -> bool:
    """Return True if a data set with these columns holds demonstrations, see `demonstration_rows`."""
    named = any(name in columns for name in PROMPTS) and any(name in columns for name in COMPLETIONS)
    return OUTPUTS in columns or named


def is_ranking(columns: Collection[str]) -> bool:
    """Return True if a data set with these columns holds preferences or rankings, see `ranking_rows`."""
    return {CHOSEN, REJECTED} <= {*columns} or {RANKED, SCORES} <= {*columns}


def pick_column(rows: Any, given: str | None, argument: str, names: Sequence[str]) -> str:
    """Return the column that an argument names, or else the first of several usual names that exists.

    Raises:
        ValueError: there is none; the message lists the columns.
    """
    columns = rows.column_names
    if found := next((name for name in ([given] if given else names) if name in columns), None):
        return found
    problem = f'"{given}" is not a column' if given else f"must be given: {' or '.join(names)} is not a column"
    raise ValueError(f"{argument} {problem} of the data set; it has {', '.join(columns)}{separator_hint(columns)}")


def demonstration_rows(
    rows: datasets.Dataset, prompt_column: str | None = None, completion_column: str | None = None
) -> datasets.Dataset:
    """Return the columns of demonstrations: ``messages``, or ``prompt``, perhaps ``input``, and ``completion``.

    Args:
        rows: a split of a data set.
        prompt_column, completion_column: names of columns; default, those of the module.

    Raises:
        ValueError: columns are missing, or the first row is neither text nor a conversation.
    """
    if OUTPUTS in rows.column_names and not (prompt_column or completion_column):
        found = {OUTPUTS: OUTPUTS}
    else:
        found = prompt_columns(rows, prompt_column)
        found["completion"] = pick_column(rows, completion_column, "completion_column", COMPLETIONS)
    return selected(rows, found)


def ranking_rows(
    rows: datasets.Dataset,
    prompt_column: str | None = None,
    chosen_column: str | None = None,
    rejected_column: str | None = None,
) -> datasets.Dataset:
    """Return the columns of preferences or rankings: ``prompt``, perhaps ``input``, and either ``chosen`` and
    ``rejected`` or ``completions`` and ``scores``. Without ``prompt``, pairs are conversations that begin equally.

    Args:
        rows: a split of a data set.
        prompt_column, chosen_column, rejected_column: names of columns; default, those of the module.

    Raises:
        ValueError: columns are missing, or the first row is neither text nor a conversation.
    """
    if {RANKED, SCORES} <= {*rows.column_names} and not (chosen_column or rejected_column):
        return selected(rows, {**prompt_columns(rows, prompt_column), RANKED: RANKED, SCORES: SCORES})
    pair = {
        CHOSEN: pick_column(rows, chosen_column, "chosen_column", [CHOSEN]),
        REJECTED: pick_column(rows, rejected_column, "rejected_column", [REJECTED]),
    }
    conversations = len(rows) and isinstance(rows[0][pair[CHOSEN]], list)
    implicit = conversations and prompt_column is None and not any(name in rows.column_names for name in PROMPTS)
    return selected(rows, pair if implicit else {**prompt_columns(rows, prompt_column), **pair})


def prompt_columns(rows: datasets.Dataset, prompt_column: str | None) -> dict[str, str]:
    """Return {"prompt": its column, "input": the column of further input if the prompt is that of instructions}."""
    prompt = pick_column(rows, prompt_column, "prompt_column", PROMPTS)
    return {"prompt": prompt, **({INPUT: INPUT} if prompt == "instruction" and INPUT in rows.column_names else {})}


def selected(rows: datasets.Dataset, columns: Mapping[str, str]) -> datasets.Dataset:
    """Return some columns under new names, {new name: column}.

    Raises:
        ValueError: the first row does not hold texts, conversations or, in ``completions`` and ``scores``, lists.
    """
    if not len(rows):
        raise ValueError("the data set has no rows")
    found = written(rows, columns.values()).select_columns(list(columns.values()))
    found = found.rename_columns({old: new for new, old in columns.items() if old != new})
    for name, value in found[0].items():
        valid = is_turn(value) if name not in (RANKED, SCORES) else isinstance(value, list)
        if not valid and value is not None:
            wanted = "lists" if name in (RANKED, SCORES) else "texts, or lists of messages with role and content"
            raise ValueError(f'column "{columns[name]}" must hold {wanted}, got {value!r:.60}')
    return found


def text_columns(features: Mapping[str, Any]) -> list[str]:
    """Return the columns of prompts and completions that hold texts, not conversations."""
    names = (*PROMPTS, *COMPLETIONS, CHOSEN, REJECTED)
    return [name for name in names if name in features and getattr(features[name], "dtype", "") in STRINGS]


def check_rows(rows: datasets.Dataset) -> None:
    """Check every row of this module, apart from its length.

    Raises:
        ValueError: the first wrong row, with its number.
    """
    for index, row in enumerate(rows):
        for name, value in row.items():
            if name == RANKED and len(value or ()) != len(row[SCORES] or ()):
                raise ValueError(f"completions and scores must be equally many in row {index}")
            if name not in (INPUT, RANKED, SCORES) and not is_turn(value):
                raise ValueError(
                    f'column "{name}" must hold a text or a conversation, got {value!r:.60} in row {index}'
                )


def is_turn(value: Any) -> bool:
    """Return True for a text, or a list of messages with role and content."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(one, Mapping) and {"role", "content"} <= one.keys() for one in value)
    return isinstance(value, str)


def is_conversational(rows: datasets.Dataset) -> bool:
    """Return True if some column of rows of this module holds conversations."""
    return any(isinstance(value, list) and is_turn(value) for value in rows[0].values())


def all_texts(rows: datasets.Dataset) -> Iterator[str]:
    """Yield all texts of rows of this module, those of conversations message by message."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from texts(value.get("content"))
        elif isinstance(value, list):
            for one in value:
                yield from texts(one)

    for row in rows:
        for value in row.values():
            yield from texts(value)


class Renderer:
    """Renders prompts and completions as the texts that a model reads.

    Args:
        tokenizer: its chat template renders conversations; `CHAT_TEMPLATE` if it has none.
        prompt_format: how prompts that are texts are rendered: "plain", as they are, the parts of an instruction
            separated by blank lines; "alpaca", in the words of Alpaca; "chat", as a message of the user.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat):
        self.tokenizer, self.prompt_format = tokenizer, prompt_format

    def chat(self, messages: Messages, **options: Any) -> str:
        """Render a conversation."""
        template = self.tokenizer.chat_template or CHAT_TEMPLATE
        return self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)

    def segments(self, messages: Messages) -> list[str]:
        """Return what comes before each answer of the assistant and the answer, in turn.

        Raises:
            ValueError: there is no answer, or the template does not render a longer conversation as a continuation.
        """
        found: list[str] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                before = self.chat(messages[:i], add_generation_prompt=True)
                whole = self.chat(messages[: i + 1])
                if not (before.startswith(done) and whole.startswith(before)):
                    raise ValueError(
                        "the chat template of the tokenizer does not render a longer conversation as a continuation "
                        "of a shorter one, so prompts and completions cannot be told apart"
                    )
                found += [before[len(done) :], whole[len(before) :]]
                done = whole
        if not found:
            raise ValueError(f'a conversation has no message of role "{ASSISTANT}"')
        return found

    def prompt(self, prompt: str, further: str | None = None) -> str:
        """Render a prompt that is a text, with further input."""
        given = further and further.strip()
        if self.prompt_format == "alpaca":
            context = f"### Input:\n{further}\n\n" if given else ""
            return ALPACA.format(ALPACA_CONTEXT if given else "", prompt, context)
        return prompt if further is None else f"{prompt}\n\n" + (f"{further}\n\n" if given else "")

    def opening(self, prompt: Turn, further: str | None = None) -> tuple[str, bool]:
        """Return a prompt as the text that a completion continues, and whether it is a conversation."""
        messages = self.messages(prompt, "", further)
        if messages is None:
            return self.prompt(prompt, further), False
        return self.chat(messages[:-1], add_generation_prompt=True), True

    def messages(self, prompt: Turn, completion: Turn, further: str | None = None) -> Messages | None:
        """Return a prompt and a completion as one conversation; None if they are texts and remain so."""
        if isinstance(prompt, str) and isinstance(completion, str):
            if self.prompt_format != "chat":
                return None
            content = prompt if not (further and further.strip()) else f"{prompt}\n\n{further}"
            prompt, completion = [as_message(USER, content.strip())], [as_message(ASSISTANT, completion)]
        prompt = [as_message(USER, prompt)] if isinstance(prompt, str) else prompt
        return prompt + ([as_message(ASSISTANT, completion)] if isinstance(completion, str) else completion)

    def demonstration(self, row: Mapping[str, Any]) -> tuple[list[str], bool]:
        """Return the segments of a row of `demonstration_rows`, prompts and completions in turn, and whether they are
        a conversation, which has its own special tokens."""
        if OUTPUTS in row:
            return self.segments(row[OUTPUTS]), True
        messages = self.messages(row["prompt"], row["completion"], row.get(INPUT))
        if messages is None:
            return [self.prompt(row["prompt"], row.get(INPUT)), row["completion"]], False
        return self.segments(messages), True

    def ranking(self, row: Mapping[str, Any]) -> tuple[str, list[str], list[float], bool]:
        """Return prompt, completions, scores, higher is better, and whether they are conversations, of a row of
        `ranking_rows`."""
        completions = row[RANKED] if RANKED in row else [row[CHOSEN], row[REJECTED]]
        scores = [float(score) for score in row[SCORES]] if RANKED in row else [1.0, 0.0]
        if len(completions) != len(scores):
            raise ValueError(
                f"completions and scores of a row must be equally many, got {len(completions)} and {len(scores)}"
            )
        if "prompt" not in row:
            shared = shared_beginning(completions)
            row = {"prompt": completions[0][:shared]}
            completions = [one[shared:] for one in completions]
        conversations = [self.messages(row["prompt"], one, row.get(INPUT)) for one in completions]
        if conversations[0] is None:
            return self.prompt(row["prompt"], row.get(INPUT)), completions, scores, False
        found = [self.segments(one) for one in conversations if one]
        prompts = ["".join(one[:-1]) for one in found]
        if len(set(prompts)) > 1:
            raise ValueError("the completions of a row must be answers to the same prompt")
        return prompts[0], [one[-1] for one in found], scores, True


def as_message(role: str, content: str) -> dict[str, str]:
    """Return a message."""
    return {"role": role, "content": content}


def shared_beginning(conversations: Sequence[Messages]) -> int:
    """Return the number of messages that all conversations begin with; each keeps at least one of its own."""
    length = min(map(len, conversations)) - 1
    return next((i for i in range(length) if any(one[i] != conversations[0][i] for one in conversations)), length)


class Encoder:
    """Texts of a `Renderer` -> token ids.

    Prompt and completion are encoded separately, so a prompt has the same tokens when a model continues it. Texts
    begin with the tokens that the tokenizer puts before any text and end with the end token; a rendered conversation
    has its own special tokens.

    Args:
        tokenizer: needs an end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.before, self.end = SpecialTokens(tokenizer).before.tolist(), tokenizer.eos_token_id

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts without special tokens around them."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def prompt(self, text: str, conversation: bool) -> list[int]:
        """Encode a prompt."""
        (ids,) = self([text])
        return ids if conversation else [*self.before, *ids]

    def completions(self, texts: Sequence[str], conversation: bool) -> list[list[int]]:
        """Encode completions."""
        return [ids if conversation else [*ids, self.end] for ids in self(texts)]


def prompt_rows(rows: datasets.Dataset, prompt_column: str | None = None) -> datasets.Dataset:
    """Return rows with their prompts in a column ``prompt``, and their other columns.

    Args:
        rows, prompt_column: see `demonstration_rows`.

    Raises:
        ValueError: there is no such column, or the first row is neither text nor a conversation.
    """
    columns = prompt_columns(rows, prompt_column)
    others = {name: name for name in rows.column_names if name not in ("prompt", *columns.values())}
    found = rows.select_columns([*columns.values(), *others])
    found = found.rename_columns({old: new for new, old in columns.items() if old != new})
    if len(found) and not is_turn(found[0]["prompt"]):
        raise ValueError(
            f'column "{columns["prompt"]}" must hold texts, or lists of messages with role and content, got '
            f"{found[0]['prompt']!r:.60}"
        )
    return found


def tokenize_prompts(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> list[np.ndarray]:
    """Return the token ids of each prompt of `prompt_rows`, int64."""
    render, encode = Renderer(tokenizer, prompt_format), Encoder(tokenizer)
    names = ["prompt", *([INPUT] if INPUT in rows.column_names else [])]
    opened = [render.opening(*row.values()) for row in rows.select_columns(names)]
    tokens = encode([text for text, _ in opened])
    return [
        np.array(ids if conversation else [*encode.before, *ids], dtype=np.int64)
        for ids, (_, conversation) in zip(tokens, opened, strict=True)
    ]


def tokenize_demonstrations(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, max_length: int
) -> datasets.Dataset:
    """Return ``input_ids`` of demonstrations, and ``completion_mask``, 1 for tokens of completions.

    Args:
        rows: of `demonstration_rows`.
        max_length: longer demonstrations are left out, and counted in the log.

    Raises:
        ValueError: a row is not valid, or none is left.
    """
    render, encode = Renderer(tokenizer, prompt_format), Encoder(tokenizer)

    def tokenize(row: dict) -> dict:
        segments, conversation = render.demonstration(row)
        parts = [encode.prompt(segments[0], conversation), *encode(segments[1:])]
        if not conversation:
            parts[-1] = [*parts[-1], encode.end]
        mask = [i % 2 for i, part in enumerate(parts) for _ in part]
        return {"input_ids": [token for part in parts for token in part], "completion_mask": mask}

    return tokenized(rows, tokenize, DEMONSTRATION, lambda row: len(row["input_ids"]), max_length)


def tokenize_rankings(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, max_length: int
) -> datasets.Dataset:
    """Return ``prompt_ids``, ``completion_ids`` and ``scores`` of rankings; those without two different scores are
    left out.

    Args:
        rows: of `ranking_rows`.
        max_length: rows with a longer prompt and completion are left out, and counted in the log.

    Raises:
        ValueError: a row is not valid, or none is left.
    """
    render, encode = Renderer(tokenizer, prompt_format), Encoder(tokenizer)

    def tokenize(row: dict) -> dict:
        prompt, completions, scores, conversation = render.ranking(row)
        return {
            "prompt_ids": encode.prompt(prompt, conversation),
            "completion_ids": encode.completions(completions, conversation),
            "scores": scores,
        }

    found = tokenized(rows, tokenize, RANKING, ranking_length, max_length)
    ranked = found.filter(lambda scores: len(set(scores)) > 1, input_columns="scores")
    if not len(ranked):
        raise ValueError(f"none of {len(found)} rows has completions of different score")
    if ties := len(found) - len(ranked):
        log.warning("%d of %d rows have no completions of different score and are left out", ties, len(found))
    return ranked


def tokenized(
    rows: datasets.Dataset,
    tokenize: Callable[[dict], dict],
    features: Features,
    length: Callable[[dict], int],
    max_length: int,
) -> datasets.Dataset:
    """Return tokenized rows of at most ``max_length`` tokens.

    Raises:
        ValueError: a row is not valid, with its number; or all rows are longer.
    """

    def numbered(row: dict, index: int) -> dict:
        for name, value in row.items():
            if value is None and name != INPUT:
                raise ValueError(f'column "{name}" must hold a text or a conversation, got null in row {index}')
        try:
            return tokenize(row)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error

    show_progress_of(rows)
    found = rows.map(numbered, with_indices=True, remove_columns=rows.column_names, features=features)
    kept = found.filter(lambda row: length(row) <= max_length)
    if not len(kept):
        raise ValueError(f"all {len(rows)} rows are longer than max_length = {max_length} tokens")
    if longer := len(found) - len(kept):
        log.warning(
            "%d of %d rows are longer than max_length = %d tokens and are left out", longer, len(found), max_length
        )
    return kept.flatten_indices() if longer else kept


def ranking_length(row: Mapping[str, Any]) -> int:
    """Return the number of tokens of the prompt with its longest completion, of a row of `tokenize_rankings`."""
    return len(row["prompt_ids"]) + max(map(len, row["completion_ids"]), default=0)


def ranking_lengths(rows: datasets.Dataset) -> np.ndarray:
    """Return `ranking_length` of all rows, (N,)."""
    columns = rows.select_columns(["prompt_ids", "completion_ids"])
    return np.array([ranking_length(row) for row in columns])


def pairs_of(scores: Sequence[float]) -> list[tuple[int, int]]:
    """Return all pairs (better, worse) of completions with different scores, as indices."""
    pairs = ((i, j) if scores[i] > scores[j] else (j, i) for i, j in combinations(range(len(scores)), 2))
    return [(i, j) for i, j in pairs if scores[i] > scores[j]]


def split_pairs(rows: datasets.Dataset) -> datasets.Dataset:
    """Return a row for each pair of a ranking, better completion first, from rows of `tokenize_rankings`."""
    if all(len(scores) == 2 and scores[0] > scores[1] for scores in rows["scores"][:]):
        return rows

    def split(batch: dict[str, list]) -> dict[str, list]:
        found: dict[str, list] = {name: [] for name in RANKING}
        for prompt, completions, scores in zip(*(batch[name] for name in RANKING), strict=True):
            for pair in pairs_of(scores):
                found["prompt_ids"].append(prompt)
                found["completion_ids"].append([completions[i] for i in pair])
                found["scores"].append([1.0, 0.0])
        return found

    return rows.map(split, batched=True, features=RANKING)
