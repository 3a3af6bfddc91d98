"""Configuration of the recurrent encoder-decoder (Bahdanau et al. 2015, arXiv:1409.0473; Luong et al. 2015)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .checks import fields_of_size, require_at_least, require_choice, require_common, require_share
from .travel import TravellingConfig

# "base" has the sizes of Bahdanau et al. (RNNsearch). "tutorial" has those of common tutorials. "tiny" has as many
# parameters as Transformer-Tiny with the same vocabulary.
SIZES = {
    "tiny": {"embedding_size": 128, "encoder_hidden_size": 160, "hidden_size": 320, "dropout": 0.3},
    "tutorial": {"embedding_size": 256, "encoder_hidden_size": 512, "hidden_size": 512, "dropout": 0.5},
    "base": {
        "embedding_size": 620,
        "encoder_hidden_size": 1000,
        "hidden_size": 1000,
        "readout": "maxout",
        "dropout": 0.0,
        "label_smoothing": 0.0,
    },
}

CHOICES = {
    "cell": ("gru", "lstm"),
    "attention_score": ("additive", "dot", "general", "concat", "none"),
    "readout": ("tanh", "maxout"),
}
LEAST_1 = ("embedding_size", "encoder_hidden_size", "hidden_size", "num_encoder_layers", "num_decoder_layers")


@strict
class TfmRNNSeq2SeqConfig(TravellingConfig):
    """Configuration of a `TfmRNNSeq2SeqModel`. Defaults to the sizes of Bahdanau et al. with a tanh readout.

    Args:
        vocab_size: size of the vocabulary shared by source and target.
        embedding_size: size of the token embeddings, and of the readout.
        encoder_hidden_size: hidden size of each direction of the encoder; its outputs are twice as wide.
        hidden_size: hidden size of the decoder, and of the additive scores.
        num_encoder_layers: number of bidirectional layers.
        num_decoder_layers: number of decoder layers.
        cell: "gru" or "lstm", with the equations of `torch.nn.GRU` and `torch.nn.LSTM`.
        attention_score: "additive" (Bahdanau et al. 2015): the first decoder layer reads the context of its previous
            state. "dot", "general" or "concat" (Luong et al. 2015, section 3.1, without input feeding): attention from
            the states of the last layer; "dot" needs ``hidden_size = 2 * encoder_hidden_size``. "none" (Cho et al.
            2014, arXiv:1406.1078): the decoder reads the last state of each encoder direction at every step.
        readout: layer from state, previous token and context to the output layer: "tanh" (Luong et al., equation 5),
            or "maxout" over pairs (Bahdanau et al., appendix A.2.2).
        dropout: dropout rate of the embeddings, of the outputs between layers, and of the readout.
        label_smoothing: label smoothing of the loss returned by ``forward(labels=...)``.
        initializer_factor: scale of the initial weights, except recurrent matrices, which are orthogonal.
        tie_word_embeddings: share one matrix between source, target and output embeddings.
        output_bias: add a learned bias to the logits.

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    model_type = "tfm_rnn_seq2seq"
    keys_to_ignore_at_inference: ClassVar = ["cache", "past_key_values"]
    attribute_map: ClassVar = {"num_hidden_layers": "num_decoder_layers", "encoder_layers": "num_encoder_layers"}
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_rnn_seq2seq.TfmRNNSeq2SeqConfig",
        "AutoModel": "modeling_rnn_seq2seq.TfmRNNSeq2SeqModel",
        "AutoModelForSeq2SeqLM": "modeling_rnn_seq2seq.TfmRNNSeq2SeqForConditionalGeneration",
    }
    # Not the decoder: its attentive layer computes values of the source outside of its forward pass.
    base_model_fsdp_plan: ClassVar = {"encoder.layers.*": "free_full_weight"}

    vocab_size: int = 30000
    embedding_size: int = 620
    encoder_hidden_size: int = 1000
    hidden_size: int = 1000
    num_encoder_layers: int = 1
    num_decoder_layers: int = 1
    cell: str = "gru"
    attention_score: str = "additive"
    readout: str = "tanh"
    dropout: float | int = 0.1
    label_smoothing: float | int = 0.1
    initializer_factor: float | int = 1.0
    tie_word_embeddings: bool = True
    output_bias: bool = False
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> "TfmRNNSeq2SeqConfig":
        """Return the configuration of a named size, "tiny", "tutorial" or "base", overridden by ``fields``.

        Raises:
            ValueError: the size is unknown.
        """
        return cls(**{**fields_of_size(SIZES, size), **fields})

    def validate_architecture(self) -> None:
        """Validate relations between fields; called by the strict validation of transformers and huggingface_hub."""
        require_common(self)
        for name, choices in CHOICES.items():
            require_choice(self, name, choices)
        require_at_least(self, LEAST_1)
        require_share(self, ("dropout", "label_smoothing"))
        if self.attention_score == "dot" and self.hidden_size != 2 * self.encoder_hidden_size:
            raise ValueError(
                f"hidden_size must be 2 * encoder_hidden_size = {2 * self.encoder_hidden_size} for "
                f'attention_score="dot", got {self.hidden_size}'
            )
