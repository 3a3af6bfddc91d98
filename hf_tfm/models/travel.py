"""How a saved model carries its code, so that it loads where this package is not installed.

transformers copies the module of a class that has ``_auto_class``, and its siblings, beside the weights; ``auto_map``
in config.json then tells each Auto class where to look. The stock map names only the class that was saved; here it
names every class of the family, so `AutoModel` and `AutoModelForSeq2SeqLM` load the same repository.
"""

from contextvars import ContextVar
from dataclasses import fields
from typing import ClassVar

from transformers import PreTrainedConfig

from .checks import refuse_misspelt, require_label_count

# Files hold fields of other versions and of conversions: only the arguments of a caller are checked for misspelling.
READING: ContextVar[bool] = ContextVar("reading", default=False)


class TravellingConfig(PreTrainedConfig):
    """A configuration that writes the full ``auto_map`` of its family.

    A family names its classes in ``auto_classes``: {Auto class: "module.Class"}.
    """

    _auto_class = "AutoConfig"
    auto_classes: ClassVar[dict[str, str]] = {}

    @property
    def auto_map(self) -> dict[str, str]:
        """The map of the saved model; where there is none, a new {}: trl and others read it from any configuration.

        transformers adds to the dictionary it finds, so that one of the class would gather every family's entries.
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
            # transformers 5.17 adds a rule for "embed_tokens" to the plan of every tied model, even one without such a
            # module (5.24 does not). The plan stays that of the class.
            self.__dict__.pop("base_model_tp_plan", None)
        self.validate_architecture()  # here its error is one line; strict validation makes two of it

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; another ``num_labels`` than that of the file goes before the labels there."""
        count, labels = kwargs.get("num_labels"), config_dict.get("id2label")
        if count is not None and labels is not None and "id2label" not in kwargs and len(labels) != count:
            config_dict = {key: value for key, value in config_dict.items() if key not in ("id2label", "label2id")}
        token = READING.set(True)
        try:
            return super().from_dict(config_dict, **kwargs)
        finally:
            READING.reset(token)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Save config.json, and the code beside it unless carrying code was turned off for this class."""
        if self._auto_class is None:
            self.__dict__.pop("auto_map", None)
        else:
            # Also replaces the "user/name--module.Class" entries of a model that came from the Hub: its copy is whole.
            self.auto_map = dict(self.auto_classes)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
