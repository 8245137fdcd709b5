"""The flags of the server's settings: one for each field of `Settings`."""

import argparse
from typing import Any

from sparse_serve.server.settings import ENV_PREFIX, Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field. A flag that is not given is not in the namespace, so that the environment counts."""
    group = parser.add_argument_group("settings", f"also read from the environment, as {ENV_PREFIX}<NAME>")
    for name, field in Settings.model_fields.items():
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = type(field.default).__name__.upper()
        group.add_argument(
            "--" + name.replace("_", "-"),
            help=f"{field.description} (default: {'none' if field.default == '' else field.default})",
            **options,
        )


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings from parsed flags, the environment and the defaults. Raises `SettingsError`."""
    return Settings(**{name: value for name, value in vars(args).items() if name in Settings.model_fields})
