"""Weight names on disk: saved files hold the names of the modules; files of transformers' own classes load too."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import WeightRenaming, register_checkpoint_conversion_mapping


class OwnNamesPreTrainedModel(PreTrainedModel):
    """Base class of every model here: `save_pretrained` writes weights under the names of ``state_dict()``.

    transformers would write the names registered below, or those of the file that the model was loaded from, which
    only `from_pretrained` translates: `Trainer`, accelerate and safetensors call ``load_state_dict`` on the file.
    """

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """Save as `PreTrainedModel.save_pretrained` does.

        Args:
            save_original_format: write the names of transformers' own class of the architecture instead, or those of
                the file that the model was loaded from.
        """
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as `torch.nn.Module.load_state_dict` does; ``strict`` accepts a file with one copy of tied weights.

        safetensors stores no tensor twice, so `save_pretrained` leaves out all names of a tied weight but one.
        """
        if not strict:  # safetensors.torch.load_model expects the names left out to be reported
            return super().load_state_dict(state_dict, strict=False, assign=assign)
        tied = getattr(self, "all_tied_weights_keys", None) or {}
        copies = {
            target: state_dict[source]
            for target, source in tied.items()
            if target not in state_dict and source in state_dict
        }
        result = super().load_state_dict({**state_dict, **copies}, strict=True, assign=assign)
        if assign and copies:
            self.tie_weights()
        return result


def register_native_names(class_name: str, names: tuple[tuple[str, str], ...]) -> None:
    """Let `from_pretrained` of the model called ``class_name`` read files with transformers' names.

    Args:
        names: (name in a file, name in the model), regular expressions, in this order when loading. They leave the
            model's own names as they are.
    """
    mapping = [WeightRenaming(source, target) for source, target in names]
    register_checkpoint_conversion_mapping(class_name, mapping, overwrite=True)
