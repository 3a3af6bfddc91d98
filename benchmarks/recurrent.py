"""Speed of the recurrent encoder-decoder with additive attention against plain torch implementations, equal weights.

python -m benchmarks recurrent [--sizes '[tiny]']

Two peers that run `torch.nn.GRUCell` step by step: "tutorial" computes scores from [state; annotation] and the
vocabulary layer at every step, as tutorials do; "loop" computes keys and, in training, the vocabulary layer once. Both
encode with a packed bidirectional `torch.nn.GRU`. Greedy decoding of the peers runs on all rows until all have ended.
"""

import statistics

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hf_tfm import TfmRNNSeq2SeqConfig, TfmRNNSeq2SeqForConditionalGeneration

from . import common


def main(
    sizes: tuple[str, ...] = ("tiny", "tutorial"),
    vocab_size: int = 10_000,
    batch_size: int = 64,
    length: int = 16,
    new_tokens: int = 24,
    rounds: int = 7,
) -> None:
    """Measure and write benchmarks/results/recurrent.json.

    Args:
        sizes: of TfmRNNSeq2SeqConfig, with random weights, without dropout.
        vocab_size: size of the vocabulary.
        batch_size: sentences per batch.
        length: tokens of the longest source and target; sources have at least half of them.
        new_tokens: limit of greedy decoding.
        rounds: timed rounds; medians are reported.
    """
    results = {}
    for size in sizes:
        torch.manual_seed(0)
        config = TfmRNNSeq2SeqConfig.of_size(size, vocab_size=vocab_size, dropout=0.0)
        ours = TfmRNNSeq2SeqForConditionalGeneration(config)
        peers = {"tutorial": Peer(ours, careful=False), "loop": Peer(ours, careful=True)}
        batch = random_batch(vocab_size, batch_size, length)
        check_equal(ours, peers, batch)
        results[size] = {
            "training_step": training(ours, peers, batch, rounds),
            "greedy": greedy(ours, peers, batch, new_tokens, rounds),
        }
        print(size, results[size], flush=True)
    common.write("recurrent", {"batch_size": batch_size, "length": length, "rounds": rounds, "sizes": results})


def random_batch(vocab_size: int, rows: int, length: int) -> dict[str, Tensor]:
    """Random sources and targets of different lengths."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(5, vocab_size, (2, rows, length), generator=generator)
    lengths = torch.arange(rows) % (length // 2) + length // 2 + 1
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


class Peer(nn.Module):
    """One-layer GRU encoder-decoder with additive attention, written step by step, with the weights of ours.

    Args:
        careful: compute what can be computed for all steps at once only once: keys and vocabulary layer.
    """

    def __init__(self, ours: TfmRNNSeq2SeqForConditionalGeneration, careful: bool):
        super().__init__()
        config, encoder, decoder = ours.config, ours.get_encoder(), ours.get_decoder()
        self.config, self.careful = config, careful
        self.embedding = nn.Embedding.from_pretrained(ours.get_input_embeddings().weight.detach(), freeze=False)
        self.encoder = nn.GRU(config.embedding_size, config.encoder_hidden_size, bidirectional=True, batch_first=True)
        both = [*encoder.layers[0].forward_rnn.parameters(), *encoder.layers[0].backward_rnn.parameters()]
        copy(self.encoder.parameters(), both)
        first, score = decoder.layers[0], decoder.score
        memory = 2 * config.encoder_hidden_size
        self.cell = nn.GRUCell(config.embedding_size + memory, config.hidden_size)
        inputs = torch.cat([first.input_proj.weight, first.context_proj.weight], dim=1)
        copy(self.cell.parameters(), [inputs, first.state_proj.weight, first.input_proj.bias, first.state_proj.bias])
        self.attention = nn.Linear(config.hidden_size + memory, config.hidden_size, bias=False)
        copy(self.attention.parameters(), [torch.cat([score.query_proj.weight, score.key_proj.weight], dim=1)])
        self.vector = nn.Parameter(score.score_vector.detach().clone())
        self.bridge = nn.Linear(config.encoder_hidden_size, config.hidden_size)
        copy(self.bridge.parameters(), decoder.bridge.parameters())
        self.readout = nn.Linear(decoder.readout.in_features, decoder.readout.out_features)
        copy(self.readout.parameters(), decoder.readout.parameters())
        self.vocabulary = nn.Linear(config.embedding_size, config.vocab_size, bias=False)
        self.vocabulary.weight = self.embedding.weight

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return memory (B, S, 2E) and the first state (B, D)."""
        packed = pack_padded_sequence(self.embed(ids), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        outputs, last = self.encoder(packed)
        memory, _ = pad_packed_sequence(outputs, batch_first=True, total_length=ids.shape[1])
        return memory, torch.tanh(self.bridge(last[1]))

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) * self.config.embedding_size**0.5

    def keys(self, memory: Tensor) -> Tensor:
        return memory @ self.attention.weight[:, self.config.hidden_size :].T

    def step(self, given: Tensor, state: Tensor, memory: Tensor, keys: Tensor | None, mask: Tensor):
        """One step: (B, M) -> the next state and the readout's input."""
        if keys is None:
            repeated = state[:, None].expand(-1, memory.shape[1], -1)
            energy = torch.tanh(self.attention(torch.cat([repeated, memory], dim=-1)))
        else:
            query = state @ self.attention.weight[:, : self.config.hidden_size].T
            energy = torch.tanh(query[:, None] + keys)
        scores = (energy @ self.vector).masked_fill(mask == 0, -1e10)
        context = torch.bmm(scores.softmax(-1)[:, None], memory)[:, 0]
        state = self.cell(torch.cat([given, context], dim=-1), state)
        return state, torch.cat([state, context, given], dim=-1)

    def predict(self, features: Tensor) -> Tensor:
        return self.vocabulary(torch.tanh(self.readout(features)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and logits (B, T, V)."""
        memory, state = self.encode(input_ids, attention_mask)
        keys = self.keys(memory) if self.careful else None
        tokens = torch.cat([labels.new_full((len(labels), 1), self.config.decoder_start_token_id), labels[:, :-1]], 1)
        outputs = []
        for token in tokens.unbind(1):
            state, features = self.step(self.embed(token), state, memory, keys, attention_mask)
            outputs.append(features if self.careful else self.predict(features))
        logits = torch.stack(outputs, dim=1)
        logits = self.predict(logits) if self.careful else logits
        smoothing = self.config.label_smoothing
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing), logits

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy decoding of (B, S): (B, T)."""
        memory, state = self.encode(input_ids, attention_mask)
        keys = self.keys(memory) if self.careful else None
        token = input_ids.new_full((len(input_ids),), self.config.decoder_start_token_id)
        done, tokens = torch.zeros_like(token, dtype=torch.bool), [token]
        for _ in range(max_new_tokens):
            state, features = self.step(self.embed(token), state, memory, keys, attention_mask)
            token = self.predict(features).argmax(-1).masked_fill(done, self.config.pad_token_id)
            tokens.append(token)
            done = done | (token == self.config.eos_token_id)
            if done.all():
                break
        return torch.stack(tokens, dim=1)


@torch.no_grad()
def copy(targets, sources) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


@torch.no_grad()
def check_equal(ours, peers: dict[str, Peer], batch: dict[str, Tensor]) -> None:
    """Raise if a peer computes something else."""
    expected = ours.eval()(**batch)
    for peer in peers.values():
        loss, logits = peer.eval()(**batch)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-4)


def training(ours, peers: dict[str, Peer], batch: dict[str, Tensor], rounds: int) -> dict:
    """Milliseconds of forward and backward pass and an AdamW step, and ratios."""

    def worker(model, loss_of):
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5)

        def work(_: int) -> int:
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
            return 1

        return work

    variants = {"ours": worker(ours, lambda model: model(**batch, return_logits=False).loss)}
    variants |= {name: worker(peer, lambda model: model(**batch)[0]) for name, peer in peers.items()}
    rates = common.interleaved(variants, rounds)
    return {
        **{f"{name}_ms": round(1000 / statistics.median(each), 1) for name, each in rates.items()},
        **{f"ours / {name}, time": round(1 / common.ratio(rates, "ours", name), 2) for name in peers},
    }


def greedy(ours, peers: dict[str, Peer], batch: dict[str, Tensor], new_tokens: int, rounds: int) -> dict:
    """Sentences per second of greedy decoding, and ratios."""
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours.eval()
    variants = {
        "ours": lambda _: len(ours.generate(**source, max_new_tokens=new_tokens, do_sample=False, num_beams=1))
    }
    for name, peer in peers.items():
        peer.eval()
        variants[name] = lambda _, peer=peer: len(peer.generate(**source, max_new_tokens=new_tokens))
    rates = common.interleaved(variants, rounds)
    return {
        **{f"{name}_sentences_per_second": round(statistics.median(each), 1) for name, each in rates.items()},
        **{f"ours / {name}, speed": round(common.ratio(rates, "ours", name), 2) for name in peers},
    }
