"""How a saved model carries its code, so that it loads where this package is not installed.

transformers copies the module of a class that has ``_auto_class``, and its siblings, beside the weights; ``auto_map``
in config.json then tells each Auto class where to look. The stock map names only the class that was saved; here it
names every class of the family, so `AutoModel` and `AutoModelForSeq2SeqLM` load the same repository.
"""

from typing import ClassVar

from transformers import PreTrainedConfig


class TravellingConfig(PreTrainedConfig):
    """A configuration that writes the full ``auto_map`` of its family.

    A family names its classes in ``auto_classes``: {Auto class: "module.Class"}.
    """

    _auto_class = "AutoConfig"
    auto_classes: ClassVar[dict[str, str]] = {}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Save config.json, and the code beside it unless carrying code was turned off for this class."""
        if self._auto_class is None:
            self.__dict__.pop("auto_map", None)
        else:
            # Also replaces the "user/name--module.Class" entries of a model that came from the Hub: its copy is whole.
            self.auto_map = dict(self.auto_classes)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
