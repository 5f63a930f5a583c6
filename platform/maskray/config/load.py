"""YAML and `--set` to a config; a config to YAML, fingerprint and JSON Schema."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from maskray.config.schema import RunConfig
from maskray.config.section import Section
from maskray.credentials import all_shown
from maskray.errors import ConfigError

S = TypeVar("S", bound=Section)
_LIKE = 0.6  # how alike a wrong key and a valid one must be for a suggestion


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice and reads `1e-4` as a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = []
    for key_node in (key for key, _ in node.value if key.tag != _MERGE):
        key, mark = loader.construct_object(key_node), key_node.start_mark
        if key in seen:
            raise ConfigError(
                f"the key {key!r} stands twice", found=f"{mark.name}, line {mark.line + 1}", fix="keep one"
            )
        seen.append(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


class _Dumper(yaml.SafeDumper):
    """The way back: a text that `_Loader` would read as a number, such as a run named 1e5, gets quotes."""


_MERGE = "tag:yaml.org,2002:merge"  # of the key `<<`
# What pydantic says of a value: what it must be, without why that one is not.
_SHOULD = re.compile(r"(?:Input|String) should (?:be (?:a valid )?)?(.+?)(?:, (?:unable|got) .*)?$")
_TYPES = {
    "boolean": "true or false",
    "dictionary": "a section of keys and values",
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "tuple": "a list",
}
_LACKS: dict[str, Callable[[list[Any], dict[str, Any]], str]] = {
    "missing": lambda keys, _: f"this {'value' if isinstance(keys[-1], int) else 'key'} is required",
    "too_short": lambda _, context: f"it must have at least {context['min_length']} item, and has none",
}
_NUMBER = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


def _from_yaml(text: str, name: str) -> Any:
    loader = _Loader(text)
    loader.name = name  # what errors call the text
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def load(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The run config of a YAML file, with its `extends:` and with `a.b=c` overrides applied.

    Raises:
        ConfigError: the file is missing or is no YAML mapping, or a value is wrong (all are listed).
    """
    return load_as(RunConfig, path, overrides)


def load_as(model: type[S], path: str | Path, overrides: Iterable[str] = ()) -> S:
    """As `load`, for a config of another kind."""
    return parse(model, with_overrides(read(Path(path)), overrides), origin=str(path))


def load_text(model: type[S], text: str, origin: str) -> S:
    """As `load_as`, of what `dump` gave."""
    return parse(model, _from_yaml(text, origin), origin)


def read(path: Path, places: Collection[str] = (), seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a YAML file merged over the files it `extends:` (a path relative to it, or a list of them).

    Args:
        path: of the file.
        places: keys whose texts are paths, relative to the file that says them; they come back absolute.
        seen: files on the way here.
    """
    path = path.resolve()
    if path in seen:
        raise ConfigError(
            "files extend each other in a circle", key="extends", found=" → ".join(map(str, [*seen, path]))
        )
    try:
        loaded = _from_yaml(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the config file cannot be read", found=f"{path} ({error})", fix="check the path") from error
    except yaml.YAMLError as error:
        raise ConfigError("the config file is not YAML", found=" ".join(str(error).split())) from error
    if not isinstance(loaded, dict):
        raise ConfigError("the config file must hold keys and values", found=f"{path}: {type(loaded).__name__}")
    bases = loaded.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError("must be a path or a list of paths", key="extends", found=f"{bases!r} in {path}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, read(path.parent / base, places, (*seen, path)))
    placed = {key: str(path.parent / loaded[key]) for key in places if isinstance(loaded.get(key), str)}
    return merge(merged, loaded | placed)


def files_of(path: Path, links: Collection[str] = ("extends", "base")) -> list[Path]:
    """The YAML file and those that it is laid over, as `read` would read them, each once and absolute.

    Args:
        path: of a file that `read` has read.
        links: keys that name other files.

    Raises:
        ConfigError: one of them is named by an absolute path, which means nothing on another machine.
    """
    found, left = [], [path.resolve()]
    while left:
        file = left.pop()
        if file in found:
            continue
        found.append(file)
        loaded = _from_yaml(file.read_text(), str(file))
        for key in links:
            value = loaded.get(key, [])
            for name in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
                if Path(name).is_absolute():
                    raise ConfigError(
                        "an absolute path means nothing on another machine",
                        key=key,
                        found=f"{name} in {file}",
                        allowed="a path relative to the file that says it",
                    )
                left.append((file.parent / name).resolve())
    return found


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section; where both say a `kind` and they differ, `over` replaces the whole."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if (
            isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind", value.get("kind"))
        ):
            out[key] = merge(old, value)
        else:
            out[key] = value
    return out


def with_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`raw` with each `a.b=c` applied; `c` is read as YAML (`null`, `[1, 2]`, `1e-4`)."""
    out = dict(raw)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key or not all(key.split(".")):
            raise ConfigError("an override must read key=value", key="--set", found=item, allowed="a.b=c")
        try:
            value: Any = _from_yaml(text, item)
        except yaml.YAMLError as error:
            raise ConfigError("the value is not YAML", key="--set", found=item, fix="quote it") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        out = merge(out, value)
    return out


def parse(model: type[S], raw: Mapping[str, Any], origin: str = "config") -> S:
    """`raw` as a section, or one `ConfigError` that lists all that is wrong with it."""
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        found: list[dict[str, Any]] = [dict(each) for each in error.errors(include_url=False)]
        # A list of which an item is wrong has too few, for pydantic: that is no second mistake.
        real = [each for each in found if each["type"] != "too_short" or not _is_inside(each["loc"], found)]
        problems = [_explain(model, each) for each in real]
        if len(problems) == 1:
            raise ConfigError(problems[0]) from error
        listed = " ".join(f"({i}) {p}" if p.endswith((".", "?")) else f"({i}) {p}." for i, p in enumerate(problems, 1))
        raise ConfigError(f"{len(problems)} mistakes: {listed}", key=origin) from error


def _is_inside(loc: tuple[Any, ...], errors: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of the errors is about something below a location."""
    return any(len(each["loc"]) > len(loc) and each["loc"][: len(loc)] == loc for each in errors)


def _explain(model: type[BaseModel], error: dict[str, Any]) -> str:
    keys, holders = _walk(model, error["loc"])
    key, context = ".".join(map(str, keys)) or "config", error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key. {_suggestion(model, keys, holders)}"
    if error["type"] in _LACKS:
        return f"{key}: {_LACKS[error['type']](keys, context)}"
    if error["type"] == "union_tag_invalid":
        allowed = context["expected_tags"].replace("'", "")
        return f"{key}.kind: no such kind (found {context['tag']!r}). Allowed: {allowed}"
    message = str(error["msg"]).removeprefix("Value error, ").partition(" or instance of ")[0]
    if isinstance(context.get("error"), ConfigError):
        return message
    shown = "" if isinstance(error["input"], Mapping | BaseModel) else f" (found {error['input']!r})"
    if should := _SHOULD.match(message):
        allowed = _TYPES.get(should[1], should[1])
        return f"{key}: it does not take this value{shown}. Allowed: {allowed}. What to do: give it such a value"
    return f"{key}: {message[0].lower() + message[1:]}{shown}"


def _walk(model: type[BaseModel], loc: tuple[Any, ...]) -> tuple[list[Any], list[type[BaseModel]]]:
    """The keys of the YAML that a location of pydantic's means, and the sections that may hold the last of them."""
    keys: list[Any] = []
    holders: list[type[BaseModel]] = [model]
    inside, is_open = holders, False
    for part in loc:
        if is_open:  # any key: the sections are those of its values
            keys, holders, is_open = [*keys, part], inside, False
            continue
        if len(inside) > 1 and (chosen := [s for s in inside if s.model_fields["kind"].default == part]):
            inside = chosen  # pydantic names the union's member here: that is no key of the YAML
            continue
        keys, holders = [*keys, part], inside
        if isinstance(part, int):  # an item of a list, of the same sections
            continue
        fields = [s.model_fields[part] for s in inside if part in s.model_fields]
        inside = [section for field in fields for section in _sections(field.annotation)]
        is_open = any(get_origin(field.annotation) is dict for field in fields)
    return keys, holders


def _suggestion(model: type[BaseModel], keys: list[Any], holders: list[type[BaseModel]]) -> str:
    *parents, wrong = map(str, keys)
    siblings = {name: ".".join([*parents, name]) for section in holders for name in section.model_fields}
    everywhere = [key for key in dict(dotted_keys(model)) if key != ".".join([*parents, wrong])]
    # What belongs elsewhere, or was written as one word: `workers`, `mask_ratio`, `decoder_depth`.
    meant = [k for k in everywhere if any("_".join(k.split(".")[i:]) == wrong for i in range(k.count(".") + 1))]
    if not meant:
        near = [(_likeness(wrong, name), key) for name, key in siblings.items()]
        near += [(_likeness(wrong.replace("_", "."), key), key) for key in everywhere]
        likeness, key = max(near)
        meant = [key] if likeness >= _LIKE else []
    return f"Did you mean {' or '.join(meant)}?" if meant else f"Valid here: {', '.join(siblings)}."


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Each key that the YAML may have, sections included, with whether it is operational."""
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        yield prefix + name, isinstance(extra, dict) and bool(extra.get("operational"))
        for part in _sections(field.annotation):
            yield from dotted_keys(part, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def identity(config: Section) -> dict[str, Any]:
    """The config without its operational fields, as plain data: equal for equal meaning."""
    out: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("operational"):
            continue
        value = getattr(config, name)
        plain = identity(value) if isinstance(value, Section) else config.model_dump(mode="json", include={name})[name]
        if plain != {} or not isinstance(value, Section):
            out[name] = plain
    return out


def fingerprint(plain: Any) -> str:
    """Sixteen hexadecimal digits that say which plain data this is."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dump(config: Section) -> str:
    """The resolved config as YAML: every field, defaults included; `load` gives it back, but for passwords."""
    return yaml.dump(written(config), Dumper=_Dumper, sort_keys=False)


def written(config: Section) -> dict[str, Any]:
    """The config as plain data for whoever may see it: every field, and no passwords."""
    return dict(all_shown(config.model_dump(mode="json")))


def json_schema(model: type[Section] = RunConfig) -> str:
    """JSON Schema of the YAML, for editors."""
    schema = model.model_json_schema()
    schema["properties"]["extends"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "File or files, relative to this one, that this config is laid over.",
    }
    # `extends:` may supply what is required, so an editor must not complain about a part.
    for section in (schema, *schema.get("$defs", {}).values()):
        section.pop("required", None)
    return json.dumps(schema, indent=2) + "\n"
