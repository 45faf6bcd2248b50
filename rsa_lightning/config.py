"""YAML layers and dotted overrides, merged into one plain dict."""

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

CLASS_NAME = re.compile(r"(\w+\.)*[A-Z]\w*")
REGISTERED = {"fsdp2": "FSDP2"}  # names of Lightning's registry for classes that take arguments


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string; configurations mean the number. A key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {twice[0]} is written twice in one mapping")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d+(?:[eE][-+]?\d+)?|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def layer_parser(command: str, options: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command that takes layers: its `config` are the files, and what it does not know are `overrides`.

    Args:
        options: what may follow the files, for the usage.
        epilog: printed as it is.
    """
    parser = argparse.ArgumentParser(
        prog=command,
        usage=f"{command} -c FILE [-c LAYER ...] {options}",
        allow_abbrev=False,  # --out may be the start of a key
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-c", "--config", action="append", required=True, metavar="FILE", help="YAML; later files win")
    return parser


def load_layers(files: Iterable[str | Path], overrides: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """Merges YAML files in order, later ones winning key by key, then sets each dotted override, read as YAML.

    Raises:
        FileNotFoundError, ValueError: naming the file or the override.
    """
    config: dict[str, Any] = {}
    for file in files:
        config = merge(config, load_file(file))
    for key, text in overrides:
        config = merge(config, nest(key, parse(text, f"--{key}")))
    return config


def load_file(file: str | Path) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    value = parse(text, str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a mapping of keys, got {type(value).__name__}")
    return value


def parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def dump(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`: mappings merge, anything else is replaced; so is another class with its arguments.

    A class may be named by a string or with `class_path` and `init_args`, as in LightningCLI: keys of a mapping that
    names none are arguments of the class below, and the name of that class alone leaves it its arguments.
    """
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _over(merged.get(key), value)
    return merged


def _over(below: Any, above: Any) -> Any:
    lower, upper = below, above
    if isinstance(below, Mapping) and "class_path" in below:
        upper = _as_class(above)
    elif isinstance(above, Mapping):
        lower = _as_class(below)
    if not isinstance(lower, Mapping) or not isinstance(upper, Mapping) or _other_class(lower, upper):
        return above
    if "class_path" in lower and not upper.keys() & {"class_path", "init_args", "dict_kwargs"}:
        upper = {"init_args": upper}
    return merge(lower, upper)


def _as_class(value: Any) -> Any:
    """The name of a class as a mapping, which takes arguments; anything else as it is."""
    name = REGISTERED.get(value, value) if isinstance(value, str) else None
    return {"class_path": name} if name is not None and CLASS_NAME.fullmatch(name) else value


def _other_class(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Whether `above` names a class that `below` does not: the arguments of the one mean nothing to the other."""
    names = [str(setting["class_path"]) for setting in (below, above) if "class_path" in setting]
    if len(names) < 2 or names[0] == names[1]:
        return False
    short = [name.split(".")[-1] for name in names]  # a class may be named without its module
    return short[0] != short[1] or all("." in name for name in names)


def nest(dotted: str, value: Any) -> dict[str, Any]:
    """nest("a.b", 1) == {"a": {"b": 1}}"""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def overrides(arguments: list[str]) -> list[tuple[str, str]]:
    """Options as dotted keys and their texts: ["--a.b", "1", "--c=2"] -> [("a.b", "1"), ("c", "2")]

    Raises:
        ValueError: something that is no option, or an option without a value.
    """
    pairs: list[tuple[str, str]] = []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--"):
            raise ValueError(f"expected --KEY VALUE, got {argument!r}")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            try:
                value = next(remaining)
            except StopIteration:
                raise ValueError(f"--{key} needs a value") from None
        pairs.append((key, value))
    return pairs
