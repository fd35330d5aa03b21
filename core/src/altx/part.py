"""One component with its settings: its plugin is asked for the config, whether it fits, and what it promises.

Whatever a plugin's code raises then is an error that names the plugin. Never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from altx.capabilities import Capabilities
from altx.config import ComponentRef, Config, validate
from altx.errors import AltxError, BrokenPlugin, ConfigError
from altx.registry import Component, Registry


@dataclass(frozen=True)
class Part:
    """A component with its settings.

    Args:
        component: what the registry found.
        config: its validated config.
        capabilities: what it can do with that config.
        path: where it stands in the model's config.
    """

    component: Component
    config: Config
    capabilities: Capabilities
    path: str

    def __str__(self) -> str:
        return str(self.component)


def resolve_part(registry: Registry, kind: str, ref: ComponentRef, path: str, dim: int) -> Part:
    """One component with its settings, checked against the model's width.

    Raises:
        AltxError: as `resolve`.
    """
    component = registry.get(kind, ref.name)
    model = config_type(component)
    with component.guard(f"{path}: reading the settings of {component} failed"):
        config = validate(model, ref.config, path=path, owner=str(component))
    with component.guard(f"{path}: {component}: asking whether it fits dim {dim} failed"):
        try:
            config.fit(dim)
        except ValueError as error:
            raise ConfigError(f"{path}: {component} cannot be used at dim {dim}: {error}") from None
    return Part(component, config, capabilities(component, config), path)


def capabilities(component: Component, config: Config) -> Capabilities:
    """What a component can do with a config.

    Raises:
        BrokenPlugin: if it does not say.
    """
    function = component.load("capabilities")
    with component.guard(f"{component}: reading its capabilities failed"):
        found = function(config)
    if not isinstance(found, Capabilities):
        raise BrokenPlugin(
            f"{component}: its capabilities are a {type(found).__name__}, not altx Capabilities", hint=component.remedy
        )
    return found


def config_type(component: Component) -> type[Config]:
    """The config class of a component.

    Raises:
        BrokenPlugin: if it cannot be imported, or is none.
    """
    found = component.load("config")
    if not (isinstance(found, type) and issubclass(found, Config)):
        raise BrokenPlugin(
            f"{component}: its config {component.spec.config!r} is not an altx.config.Config", hint=component.remedy
        )
    return found


def examine(component: Component) -> str | None:
    """Why a component cannot be used, in words, as far as that shows without importing torch; None if it can."""
    if reason := component.missing():
        return f"{component}: {reason}"
    if not {"config", "capabilities"} <= set(component.spec.roles):
        return None  # of a kind that another package adds, and understands
    try:
        model = config_type(component)
        if not any(field.is_required() for field in model.model_fields.values()):
            with component.guard(f"{component}: its default settings are refused"):
                config = model()
            capabilities(component, config)
    except AltxError as error:
        return error.what
    return None
