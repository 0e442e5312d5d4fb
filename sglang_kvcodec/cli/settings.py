"""Options of a command from flags, the environment and a TOML file, by the same names; the first of them that has it.

``--scrub-rate``, ``KVCODEC_SERVE_SCRUB_RATE`` and ``scrub-rate`` in the file are one setting. Values are read alike
wherever they stand, and a name that is none is refused, so that no misspelt setting is quietly a default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import pathlib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sglang_kvcodec.errors import ConfigurationError

_SWITCHES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One option.

    Attributes:
        name: of the flag without its dashes, and in the file.
        field: of the parsed arguments.
        kind: makes the value from text; None for text itself.
        choices: what it may be; None for anything.
        default: its value where nobody says another.
        is_switch: a flag without a value.
    """

    name: str
    field: str
    kind: Callable[[str], Any] | None
    choices: tuple[str, ...] | None
    default: Any
    is_switch: bool

    def parse(self, value: object, where: str) -> Any:
        """The value that stands in the environment or a file.

        Raises:
            ConfigurationError: it is none, with ``where`` it stands.
        """
        if self.is_switch:
            word = str(value).lower() if isinstance(value, (bool, str)) else ""
            if word not in _SWITCHES:
                raise ConfigurationError(f"{where}: {self.name} is true or false, not {value!r}")
            return _SWITCHES[word]
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ConfigurationError(f"{where}: not a value for {self.name}: {value!r}")
        text = str(value)
        if self.choices is not None and text not in self.choices:
            raise ConfigurationError(f"{where}: {self.name} is one of {', '.join(self.choices)}, not {text!r}")
        try:
            return text if self.kind is None else self.kind(text)
        except (ValueError, argparse.ArgumentTypeError):
            raise ConfigurationError(f"{where}: not a value for {self.name}: {text!r}") from None


@dataclasses.dataclass(frozen=True)
class Resolved:
    """The value of every setting, and where it came from: ``flag``, an environment variable, a file or ``default``."""

    values: dict[str, Any]
    origins: dict[str, str]

    def namespace(self) -> argparse.Namespace:
        """The values as parsed arguments."""
        return argparse.Namespace(**self.values)


class Settings:
    """Adds a command's options to its parser as flags, and finds their values.

    Add options to this object as to a parser, all but those that can be flags only.
    """

    def __init__(
        self, parser: argparse._ActionsContainer, environment_prefix: str, known: dict[str, Setting] | None = None
    ) -> None:
        """Adds options to a parser, or a group of one.

        Args:
            parser: gets the flags.
            environment_prefix: what the options' variables begin with.
            known: the options so far, which those of a group join; None for none.
        """
        self._parser = parser
        self._prefix = environment_prefix
        self._settings: dict[str, Setting] = {} if known is None else known

    def add_argument(self, *flags: str, **options: Any) -> None:
        """Adds an option as ``ArgumentParser.add_argument`` does; its first flag names it."""
        default = options.pop("default", None)
        is_switch = options.get("action") == "store_true"
        # Absent unless it is on the command line: then it can be told from its default.
        action = self._parser.add_argument(*flags, default=argparse.SUPPRESS, **options)
        choices = options.get("choices")
        self._settings[flags[0].removeprefix("--")] = Setting(
            flags[0].removeprefix("--"),
            action.dest,
            options.get("type"),
            None if choices is None else tuple(choices),
            False if is_switch else default,
            is_switch,
        )

    def add_argument_group(self, title: str) -> Settings:
        """A group of options in the help, as ``ArgumentParser.add_argument_group`` gives."""
        return Settings(self._parser.add_argument_group(title), self._prefix, self._settings)

    def resolve(self, given: argparse.Namespace, environment: Mapping[str, str], file: pathlib.Path | None) -> Resolved:
        """Every setting's value.

        Args:
            given: what was on the command line.
            environment: of the process.
            file: a TOML file, or None.

        Raises:
            ConfigurationError: a name that is none, a bad value, or a file that can't be read.
        """
        names = {self._variable(name): name for name in self._settings}
        in_environment = {variable: text for variable, text in environment.items() if variable.startswith(self._prefix)}
        for variable in in_environment.keys() - names.keys():
            raise ConfigurationError(f"no setting has the variable {variable}{_like(variable, names)}")
        values = {setting.field: setting.default for setting in self._settings.values()}
        origins = dict.fromkeys(self._settings, "default")
        for name, value in (_read_toml(file) if file is not None else {}).items():
            if name not in self._settings:
                raise ConfigurationError(f"{file}: there is no setting {name!r}{_like(name, self._settings)}")
            values[self._settings[name].field] = self._settings[name].parse(value, str(file))
            origins[name] = str(file)
        for variable, text in in_environment.items():
            name = names[variable]
            values[self._settings[name].field] = self._settings[name].parse(text, variable)
            origins[name] = variable
        for name, setting in self._settings.items():
            if hasattr(given, setting.field):
                values[setting.field] = getattr(given, setting.field)
                origins[name] = "flag"
        return Resolved(values, origins)

    def to_toml(self, resolved: Resolved, show: Callable[[str, Any], Any] = lambda name, value: value) -> str:
        """All settings as such a file, each with where it came from; ``show`` may change what is shown of one."""
        lines = []
        for name, setting in self._settings.items():
            value = show(name, resolved.values[setting.field])
            # What has no value has no line in TOML either.
            line = f"# {name} is not set" if value is None else f"{name} = {_toml_value(value)}"
            lines.append(f"{line}  # {resolved.origins[name]}" if value is not None else line)
        return "\n".join(lines)

    def _variable(self, name: str) -> str:
        return self._prefix + name.upper().replace("-", "_")


def _like(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _read_toml(file: pathlib.Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigurationError(f"can't read {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} is no TOML: {error}") from error


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    # A TOML string takes JSON's escapes, but for what JSON leaves as it is.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
