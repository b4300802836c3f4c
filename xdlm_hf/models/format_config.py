"""What the configs of all model families share, and code that Transformers cannot copy."""

from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME


class PackageCode:
    """Mixin of configs and models whose code is in several folders of this package; list it before Transformers' base.

    Code loaded from the Hub is in one folder.
    """

    @classmethod
    def in_package(cls) -> bool:
        """Whether the class is this package's, not loaded from code files beside a checkpoint."""
        return not cls.__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Transformers' method, which saves only the code files of one folder.

        Raises:
            ValueError: For a class of this package.
        """
        if cls.in_package():
            raise ValueError(
                f"{cls.__name__}.register_for_auto_class would save only a part of the model's code; "
                "use xdlm_hf.export_for_hub(model, folder)."
            )
        super().register_for_auto_class(*args, **kwargs)


class FormatConfig(PackageCode, PreTrainedConfig):
    """Base of a config in the field names of a checkpoint format; a subclass calls `take_standard_names` first."""

    def take_standard_names(self, kwargs: dict[str, Any]) -> None:
        """Set the fields of Transformers' standard names among `kwargs`, and remove them.

        The base class would set them only after the values that a subclass derives from the fields.
        """
        for alias, field in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, field, kwargs.pop(alias))

    def __post_init__(self, **kwargs: Any):
        if self.in_package():
            # It names code files of the folder it was read from, which are missing where the config is saved.
            kwargs.pop("auto_map", None)
            # Registers the networks: before a network is asked for, and not while Transformers' modules are loaded,
            # some of which import the Auto classes themselves.
            import_module("xdlm_hf.models.registry")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        # Overrides are set before construction, so that derived values follow them and all are checked.
        own = [base for base in cls.__mro__ if issubclass(base, FormatConfig)]
        fields = {name for base in own for name in base.__annotations__} | cls.attribute_map.keys()
        overrides = {name: kwargs.pop(name) for name in fields & kwargs.keys()}
        return super().from_dict({**config_dict, **overrides}, **kwargs)
