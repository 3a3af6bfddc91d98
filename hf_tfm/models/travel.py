"""Saving of a model's code with its weights, so that it loads where this package is not installed.

transformers copies the module of a class that has ``_auto_class``, and its siblings, next to the weights; ``auto_map``
in config.json maps each Auto class to its module and class. The stock map contains only the class that was saved; here
it contains every class of the family, so `AutoModel` and `AutoModelForSeq2SeqLM` load the same repository.
"""

from contextvars import ContextVar
from dataclasses import fields
from typing import ClassVar

from transformers import PreTrainedConfig

from .checks import refuse_misspelt, require_label_count
from .encoder_attention import method_of

# Config files contain fields of other versions and of conversions, so only a caller's arguments are checked for typos.
READING: ContextVar[bool] = ContextVar("reading", default=False)


class TravellingConfig(PreTrainedConfig):
    """Base configuration that writes the full ``auto_map`` of its family.

    Each family lists its classes in ``auto_classes``: {Auto class: "module.Class"}.
    """

    _auto_class = "AutoConfig"
    auto_classes: ClassVar[dict[str, str]] = {}
    # Exact attention, unless a model family turns these into fields; see `encoder_attention`.
    encoder_attention: ClassVar = "full"
    encoder_attention_kwargs: ClassVar = None
    decoder_attention: ClassVar = "full"
    decoder_attention_kwargs: ClassVar = None
    qkv_size: ClassVar = None  # that of the hidden states
    # Not compressed, unless a model family turns these into fields; see `compressed`.
    layer_num_attention_heads: ClassVar = None
    layer_intermediate_sizes: ClassVar = None
    low_rank: ClassVar = None
    int8: ClassVar = None

    @property
    def auto_map(self) -> dict[str, str]:
        """Return the map of the saved model, or a new {}: trl and others read it from any configuration.

        transformers adds to the dictionary it finds, so a class attribute would collect the entries of every family.
        """
        return self.__dict__.get("auto_map", {})

    @auto_map.setter
    def auto_map(self, value: dict[str, str]) -> None:
        self.__dict__["auto_map"] = value

    def __post_init__(self, **kwargs):
        if not READING.get():
            known = {field.name for field in fields(self)} | set(self.attribute_map)
            refuse_misspelt(f"field of {type(self).__name__}", kwargs, known | {"num_labels"})
        require_label_count(self, kwargs.get("num_labels"))
        super().__post_init__(**kwargs)
        if "base_model_tp_plan" not in kwargs:
            # transformers 5.17 adds a rule for "embed_tokens" to the plan of every tied model, even without such a
            # module (5.24 does not). Keep the plan of the class.
            self.__dict__.pop("base_model_tp_plan", None)
        self.validate_attention()
        self.validate_architecture()  # here its error is one line; strict validation raises a two-line error

    def validate_attention(self) -> None:
        """Validate the attention methods; called by the strict validation of transformers and huggingface_hub."""
        method_of(self)
        method_of(self, causal=True)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Load as in transformers; a ``num_labels`` that differs from the file overrides the labels of the file."""
        count, labels = kwargs.get("num_labels"), config_dict.get("id2label")
        if count is not None and labels is not None and "id2label" not in kwargs and len(labels) != count:
            config_dict = {key: value for key, value in config_dict.items() if key not in ("id2label", "label2id")}
        token = READING.set(True)
        try:
            return super().from_dict(config_dict, **kwargs)
        finally:
            READING.reset(token)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Save config.json, and the model code unless remote code is disabled for this class."""
        if self._auto_class is None:
            self.__dict__.pop("auto_map", None)
        else:
            # Also replaces "user/name--module.Class" entries of a model loaded from the Hub: the copy is complete.
            self.auto_map = dict(self.auto_classes)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
