"""The options of a run: fields of a config, each with its default, its check, and what `--help` says of it."""

from collections.abc import Callable
from dataclasses import Field, field, fields
from typing import Any, get_args

from fastelbo._internal.arguments import Check, instance, one_of


def option(
    default: object,
    text: str,
    metavar: str | None = None,
    check: Check | None = None,
    *,
    choices: tuple[str, ...] | None = None,
    flag: str | None = None,
    parse: Callable[[str], object] | None = None,
) -> Any:
    """A field of a config.

    Args:
        default: its default; None: not set.
        text, metavar: what `--help` says of it.
        check: which values it takes.
        choices: the values themselves, in place of a check.
        flag: that of the command; by default the name of the field.
        parse: the text behind the flag -> the value; by default the type of the field.
    """
    check = one_of(choices) if choices else check
    about = {"help": text, "metavar": metavar, "check": check, "choices": choices, "flag": flag, "parse": parse}
    return field(default=default, metadata=about)


def _flag(each: Field[Any]) -> str:
    return str(each.metadata["flag"] or f"--{each.name.replace('_', '-')}")


def _type(each: Field[Any]) -> type:
    kind: type = (get_args(each.type) or (each.type,))[0]
    return kind


def names(config: type) -> dict[str, str]:
    """What an option may be called in a file, as its field or as its flag -> its field."""
    return {name: each.name for each in fields(config) for name in (each.name, _flag(each).removeprefix("--"))}


def check(config: Any) -> None:
    """Check every option by itself.

    Raises:
        TypeError: a value of another type.
        ValueError: NaN, infinity, a number out of range, or an unknown name.
    """
    for each in fields(config):
        value, kind = getattr(config, each.name), _type(each)
        if value is not None or each.default is not None:
            (each.metadata["check"] or instance(kind, f"a {kind.__name__}"))(each.name, value)


def add_flags(add: Callable[..., object], *configs: type) -> None:
    """`add` a flag for every field of the configs, as `ArgumentParser.add_argument` does; of one name, the first."""
    seen: set[str] = set()
    for each in (each for config in configs for each in fields(config)):
        if each.name in seen:
            continue
        seen.add(each.name)
        about = each.metadata
        if each.type is bool:
            add(_flag(each), dest=each.name, help=about["help"], action="store_true")
            continue
        add(
            _flag(each),
            dest=each.name,
            help=about["help"] if each.default is None else f"{about['help']} (default: {each.default})",
            type=about["parse"] or _type(each),
            choices=about["choices"],
            metavar=about["metavar"],
        )
