"""The config.json of a model, read so that a damaged field is wrong input that names its file."""

from pathlib import Path
from typing import Any


def read_config(name: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Read the configuration of a model as `transformers.AutoConfig.from_pretrained` does.

    Args:
        name: a folder, its config.json, or a name on the hub.
        trust_remote_code: whether code that the model brings along may run.

    Raises:
        ValueError: a field has a value of another type than its model allows, or the model needs code of its own that
            may not run; the message names file and field.
        OSError: there is no such file.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig

    file = Path(name) / "config.json" if Path(name).is_dir() else name
    # looked at before the configuration is made: only some releases of transformers check it, in their own words
    values = PreTrainedConfig.get_config_dict(name)[0]
    architectures = values.get("architectures")
    names = [] if architectures is None else architectures
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(_no_model_class(file, architectures))
    code = _untrusted_code(values, names)
    if code is not None and not trust_remote_code:
        raise ValueError(_needs_trust(file, code))  # before transformers asks on the terminal, or takes another class
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except StrictDataclassError as error:  # no ValueError of its own
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from None


def exported_class(folder: Path, config: Any, *, trust_remote_code: bool = False) -> Any:
    """Return the class of the model in a folder, by its configuration.

    Args:
        folder: of the model.
        config: its configuration.
        trust_remote_code: whether code that the model brings along may run.

    Raises:
        ValueError: it names no model class of transformers, or one of its own that may not run.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    architecture = (config.architectures or [None])[0]
    own = getattr(config, "auto_map", None) or {}
    auto = next((name for name, place in own.items() if str(place).rpartition(".")[2] == architecture), None)
    if auto is not None and trust_remote_code:
        trusted: Any = get_class_from_dynamic_module(own[auto], str(folder))
        trusted.register_for_auto_class(auto)  # so that `save_pretrained` takes its code along
        return trusted
    made = getattr(transformers, str(architecture), None)
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        if auto is not None:
            raise ValueError(_needs_trust(folder / "config.json", own[auto]))
        raise ValueError(_no_model_class(folder / "config.json", config.architectures))
    return made


def _untrusted_code(values: dict[str, Any], architectures: list[str]) -> str | None:
    """The code that a model cannot do without: of its configuration, or of a class that transformers does not have."""
    import transformers

    own = values.get("auto_map") or {}
    if "AutoConfig" in own and values.get("model_type") not in transformers.CONFIG_MAPPING:
        return str(own["AutoConfig"])
    missing = [name for name in architectures if not hasattr(transformers, name)]
    return next((str(place) for place in own.values() if str(place).rpartition(".")[2] in missing), None)


def _needs_trust(file: str | Path, code: str) -> str:
    return (
        f"{file}: the model needs code of its own ({code}); read that code, and if you trust it, pass "
        "trust_remote_code=True (--trust-remote-code)"
    )


def _no_model_class(file: str | Path, architectures: Any) -> str:
    return f"{file}: architectures must name a model class of transformers, got {architectures!r}"
