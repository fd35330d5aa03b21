"""Optimizer groups that keep what each component asks for its parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from altx.layer import Component, descendants


def optimizer_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for any `torch.optim` optimizer.

    Matrices decay; vectors and scalars (norms, biases) do not; a component's `param_groups()` overrides both
    the decay and the rate; its "lr_scale" multiplies the rate.

    Args:
        model: the model or any part of it.
        lr: learning rate where a component asks for none.
        weight_decay: decay where a component asks for none.

    Returns:
        Groups with "params", "names", "lr" and "weight_decay".

    Raises:
        KeyError: if a component names a parameter that it does not have.
    """
    options: dict[str, dict[str, Any]] = {}
    owners = [("", model)] if isinstance(model, Component) else []
    for path, component in [*owners, *descendants(model)]:
        assert isinstance(component, Component)
        own = dict(component.named_parameters())
        for name, wanted in component.param_groups().items():
            if name not in own:
                raise KeyError(
                    f"{type(component).__name__}.param_groups() names {name!r}, which is not one of {sorted(own)}"
                )
            whole = f"{path}.{name}" if path else name
            options[whole] = {**options.get(whole, {}), **wanted}
    groups: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        settings = {"lr": lr, "weight_decay": weight_decay if parameter.dim() > 1 else 0.0, **options.get(name, {})}
        settings["lr"] *= settings.pop("lr_scale", 1.0)
        group = groups.setdefault(tuple(sorted(settings.items())), {**settings, "params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
