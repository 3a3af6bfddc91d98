"""Components of BERT: embeddings, pooler and masked language modelling head (Devlin et al. 2019, arXiv:1810.04805,
figure 2 and section 3.1).

Shapes: B sequences; T tokens; D = config.hidden_size; V = config.vocab_size.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .attention import MultiHeadAttention
from .attention_method import AttentionWeights
from .blocks import EncoderBlock
from .configuration_bert import TfmBertConfig
from .cross_entropy import head_cross_entropy, label_smoothed_cross_entropy
from .dropout import Dropout
from .input_checks import embed, look_up
from .losses import labelled, per_item, require_labels
from .native_names import OwnNamesPreTrainedModel
from .sequence_positions import WITH_TABLES, make_positions

# Weight names of transformers' BERT and of earlier versions of this package: (name in the file, name in the model),
# applied in this order on loading. Each pattern is anchored to a block, so that modules added by a subclass keep their
# names.
NATIVE_NAMES = (
    (r"embeddings\.LayerNorm\.", "embeddings.norm."),
    (r"encoder\.layer\.", "layers."),
    (r"(?<=\d\.)attention\.self\.query\.", "self_attn.q_proj."),
    (r"(?<=\d\.)attention\.self\.key\.", "self_attn.k_proj."),
    (r"(?<=\d\.)attention\.self\.value\.", "self_attn.v_proj."),
    (r"(?<=\d\.)attention\.output\.dense\.", "self_attn.out_proj."),
    (r"(?<=\d\.)attention\.output\.LayerNorm\.", "self_attn_residual.norm."),
    (r"(?<=\d\.)intermediate\.dense\.", "feed_forward.up_proj."),
    (r"(layers?\.\d+)\.output\.dense\.", r"\1.feed_forward.down_proj."),
    (r"(layers?\.\d+)\.output\.LayerNorm\.", r"\1.feed_forward_residual.norm."),
    # The first BERT checkpoints, such as google-bert/bert-base-uncased; "(?!)" never matches, so it is never written.
    (r"norm\.gamma", "norm.weight(?!)"),
    (r"norm\.beta", "norm.bias(?!)"),
)
HEAD_NAMES = (
    (r"cls\.predictions\.transform\.dense\.", "lm_head.dense."),
    (r"cls\.predictions\.transform\.LayerNorm\.", "lm_head.norm."),
    (r"cls\.predictions\.bias", "lm_head.decoder.bias"),
)
NSP_NAMES = ((r"cls\.seq_relationship\.", "nsp_head."),)


class TfmBertPreTrainedModel(OwnNamesPreTrainedModel):
    """Base class of the BERT models: weight initialisation, loading and saving."""

    config: TfmBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TfmBertEmbeddings", "EncoderBlock"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": EncoderBlock, "attentions": MultiHeadAttention}  # noqa: RUF012

    def returns_logits(self, labels: Tensor | None) -> bool:
        """Return False in training with labels if the configuration has ``training_logits=False``."""
        return self.config.training_logits or not self.training or labels is None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise matrices and embeddings from N(0, ``initializer_range``), as the authors do, biases to zero."""
        std = self.config.initializer_range
        if isinstance(module, AttentionWeights):
            module.initialize()
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, WITH_TABLES):
            module.reset_parameters()


def positions_of(position_ids: Tensor | None, states: Tensor) -> tuple[Tensor, int | None]:
    """Return the positions (T,), or (B, T) if given, of states (B, T, D), and their end if they are not given."""
    if position_ids is not None:
        return position_ids, None
    length = states.shape[1]
    return torch.arange(length, device=states.device), length


class TfmBertEmbeddings(nn.Module):
    """Sum of token, position and segment embeddings, normalised (figure 2)."""

    def __init__(self, config: TfmBertConfig):
        super().__init__()
        D, self.config = config.hidden_size, config
        self.word_embeddings = nn.Embedding(config.vocab_size, D, padding_idx=config.pad_token_id)
        self.position_embeddings = make_positions(config, config.num_hidden_layers)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, D) if config.type_vocab_size else None
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Embed ids (B, T), or word embeddings (B, T, D), to (B, T, D).

        Args:
            token_type_ids: (B, T), segment of each token; default: all 0. Ignored by a model without segment
                embeddings, so that any tokenizer can be used.
            position_ids: (B, T) or (1, T); default: 0 to T - 1.

        Raises:
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds`` are given, the input is empty or too
                long, or, on a CPU, an id is out of range.
        """
        words = embed(self.word_embeddings, input_ids, inputs_embeds)
        length, longest = words.shape[1], self.config.max_position_embeddings
        learned = self.config.position_embedding_type == "learned"
        if learned and position_ids is None and length > longest:
            raise ValueError(f"the input has {length} tokens, but max_position_embeddings is {longest}")
        positions, end = positions_of(position_ids, words)
        table = self.position_embeddings
        if learned:
            added = look_up(table, positions, "position_ids", "max_position_embeddings")
        else:
            added = table(positions, end)
        states = words if added is None else words + added.to(words.dtype)
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = positions.new_zeros(1, length)
            table = self.token_type_embeddings
            states = states + look_up(table, token_type_ids, "token_type_ids", "type_vocab_size")
        return self.dropout(self.norm(states))


class Pooler(nn.Module):
    """Linear layer and activation on the first token's state (section 3, "[CLS]")."""

    def __init__(self, config: TfmBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Sequential(*(ACT2FN[name] for name in config.pooler.split("_")))

    def forward(self, states: Tensor) -> Tensor:
        """Pool the states: (B, T, D) -> (B, D)."""
        return self.activation(self.dense(states[:, 0]))


class MaskedLMHead(nn.Module):
    """Masked language modelling head: dense layer, norm, and output layer (section 3.1, "Masked LM").

    The output layer is tied to the word embeddings. A loss without logits (``return_logits=False``) calls the layers
    of the head one by one: forward hooks on the layers then run, but not hooks on this module.
    """

    def __init__(self, config: TfmBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def transform(self, states: Tensor) -> Tensor:
        """Transform states (..., D) -> (..., D) for the product with the word embeddings."""
        return self.norm(self.activation(self.dense(states)))

    def forward(self, states: Tensor) -> Tensor:
        """Compute logits: (..., D) -> (..., V)."""
        return self.decoder(self.transform(states))

    def loss(self, states: Tensor, labels: Tensor, items: Tensor | int | None, positions: Tensor | None) -> Tensor:
        """Compute the cross-entropy of labels (B, T) from states (B, T, D) without materialising the logits.

        Args:
            items: divisor of the summed loss; default: the number of labels.
            positions: (n,) int64 indices of the labelled tokens among the B T; by default they are searched here,
                which synchronises a GPU.
        """
        states, labels = states.flatten(0, 1), labels.flatten()
        positions = labelled(labels).nonzero()[:, 0] if positions is None else positions
        # Labelled rows only: the product with V words is most of the work, and about 15 % of the tokens are masked.
        total = head_cross_entropy(self.decoder, self.transform(states[positions]), labels[positions])
        return per_item(total, len(positions), items)


def masked_lm_loss(
    head: MaskedLMHead,
    vocab_size: int,
    states: Tensor,
    labels: Tensor | None,
    items: int | Tensor | None,
    return_logits: bool,
    positions: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return loss and logits (B, T, V) of states (B, T, D), each None unless requested.

    Raises:
        TypeError, ValueError: labels are not (B, T) or, on a CPU, not in the vocabulary.
    """
    if labels is not None:
        require_labels(labels, vocab_size, tuple(states.shape[:-1]))
    if not return_logits:
        return None if labels is None else head.loss(states, labels, items, positions), None
    logits = head(states)
    if labels is None:
        return None, logits
    total = label_smoothed_cross_entropy(logits.flatten(0, 1), labels.flatten())
    return per_item(total, labelled(labels).sum(), items), logits
