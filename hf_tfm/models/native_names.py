"""Weight names in checkpoints: saved files use module names; files of transformers' own classes can be loaded."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import WeightRenaming, register_checkpoint_conversion_mapping

from .compressed import build_compressed


class OwnNamesPreTrainedModel(PreTrainedModel):
    """Base class of all models; `save_pretrained` writes weights under the names of ``state_dict()``.

    transformers would write the names registered below, or those of the file that the model was loaded from, which
    only `from_pretrained` translates: `Trainer`, accelerate and safetensors call ``load_state_dict`` on the file.
    """

    def post_init(self) -> None:
        """Finish the construction: compress layers as the configuration says, then initialise the weights."""
        build_compressed(self, is_base=self.base_model is self)
        super().post_init()

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """Save the model like `PreTrainedModel.save_pretrained`.

        Args:
            save_original_format: write the weight names of transformers' own class of the architecture instead, or
                those of the file that the model was loaded from.
        """
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights like `torch.nn.Module.load_state_dict`; ``strict`` accepts one copy of tied weights.

        safetensors never stores a tensor twice, so `save_pretrained` omits all but one name of a tied weight.
        """
        if not strict:  # safetensors.torch.load_model expects the omitted names to be reported
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
    """Register the names of transformers' weights, so that ``class_name.from_pretrained`` can read its files.

    Args:
        names: pairs of regular expressions (name in the file, name in the model), applied in this order on loading.
            They leave the model's own names unchanged.
    """
    mapping = [WeightRenaming(source, target) for source, target in names]
    register_checkpoint_conversion_mapping(class_name, mapping, overwrite=True)
