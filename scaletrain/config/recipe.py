"""Recipes before validation: YAML files, their bases (`base:`), dotted overrides, and how they are
merged into one mapping.

YAML 1.2 rules apply: `1e-6` is a number and `on` is a word.
"""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import ScalarNode

# Limits far above any recipe: whatever a file contains is read or refused quickly.
# Bytes of a file.
BYTES = 1_000_000
# Nested mappings and lists.
DEPTH = 32
# Values; those that an alias repeats count again.
SIZE = 10_000
# Characters of a value, such as a path.
TEXT = 5_000
# Bases of a recipe.
BASES = 16
# Characters of a user's text that a message quotes.
SHOWN = 200
# Errors that one message lists.
ERRORS = 10
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# The recipes of the project: the folder `configs` of the repository, by a link in a clone and as a
# copy in an installed package.
CONFIGS = Path(__file__).parents[1] / "configs"


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the text names the file, the key and the
    fix.
    """


# Commas outside of braces.
_COMMA = re.compile(r",(?![^{]*\})")
# Sections that may be written as a single word, and the key which that sets.
_SHORT = {"data": "path", "method": "name", "engine": "name"}


def long(key: str, value: Any) -> Any:
    """`method: byol` means `method: {name: byol}`, and `data: synthetic` means `data: {path:
    synthetic}`.
    """
    return {_SHORT[key]: value} if key in _SHORT and isinstance(value, str) else value


def shards(value: Any) -> Any:
    """A list of folders and patterns as one string, `[A, B]`."""
    if not isinstance(value, list | tuple) or not all(isinstance(path, str) for path in value):
        return value
    if wrong := next((path for path in value if _COMMA.search(path)), None):
        raise ValueError(f"'{wrong}' has a comma, where a path of a list ends")

    return f"[{', '.join(value)}]"


def listed(shards: str) -> list[str]:
    """The folders and patterns in the string `[A, B]`; any other string is a single one."""
    if not (shards.startswith("[") and shards.endswith("]")) or Path(shards).exists():
        return [shards]
    return [path.strip().strip("'\"") for path in _COMMA.split(shards[1:-1])]


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to a misspelt one, or nothing."""
    close = difflib.get_close_matches(name[:SHOWN], list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def closest(name: str, known: Iterable[str]) -> str:
    """As nearest, in parentheses."""
    text = nearest(name, known).removeprefix("; ")
    return f" ({text})" if text else ""


def brief(text: str, limit: int = SHOWN) -> str:
    """A user's text for a message: on one line, and cut off if it is long."""
    line = "".join(character if character.isprintable() else " " for character in text[:limit])
    return line if len(text) <= limit else f"{line}... ({len(text):,} characters)"


class _Composer(Composer):
    """Limits size and depth, so that a few lines of aliases or brackets cannot fill the memory."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self._depth = self._size = 0
        # Values in each complete node, by the node's identity.
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        before, repeats = self._size, self.parser.check_event(AliasEvent)
        self._depth += 1
        if self._depth > DEPTH:
            raise ConfigError(f"nested more than {DEPTH} levels deep")

        node = super().compose_node(parent, index)
        if repeats and id(node) not in self._sizes:
            raise ConfigError("an alias lies within what it repeats")
        if isinstance(node, ScalarNode) and len(node.value) > TEXT:
            raise ConfigError(
                f"a value of {len(node.value):,} characters is too long: {brief(node.value)}"
            )

        self._depth -= 1
        self._size += self._sizes.get(id(node), 1)
        self._sizes.setdefault(id(node), self._size - before)
        if self._size > SIZE:
            raise ConfigError(f"too large: more than {SIZE:,} values, counting what aliases repeat")

        return node


class _Constructor(SafeConstructor):
    """Refuses integers of more than 64 bits."""

    def construct_yaml_int(self, node: Any) -> int:
        if (
            len(node.value) > 70
            or not -(2**63) <= (value := super().construct_yaml_int(node)) < 2**64
        ):
            raise ConfigError(f"a number of more than 64 bits: {brief(node.value)}")

        return int(value)


_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_yaml_int)


def yaml() -> Any:
    result: Any = YAML(typ="safe", pure=True)
    result.Composer, result.Constructor = _Composer, _Constructor
    # lists of numbers on one line
    result.default_flow_style = None
    result.width = 120
    # keep the schema's order
    result.sort_base_mapping_type_on_output = False

    return result


def parse(text: str) -> Any:
    """The value of a YAML text. Raises ConfigError without naming the file, which the caller
    knows.
    """
    try:
        return yaml().load(text)
    except ConfigError:
        raise
    except MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        where = f" (line {place.line + 1}, column {place.column + 1})" if place else ""
        raise ConfigError(
            "not valid YAML: "
            f"{brief(' '.join(filter(None, (error.context, error.problem))))}{where}"
        ) from None
    except YAMLError as error:
        raise ConfigError(f"not valid YAML: {brief(' '.join(str(error).split()))}") from None
    except (
        Exception
    ) as error:  # Python's own come through, e.g. that of a day that is in no calendar
        raise ConfigError(
            f"not valid YAML, a value does not match its form or tag: {brief(str(error))}"
        ) from None


def document(path: Path) -> Any:
    """The value of a YAML file. Raises ConfigError."""
    try:
        return parse(_text(path))
    except ConfigError as error:
        raise ConfigError(f"{brief(str(path), 1000)}: {error}") from None


def _text(path: Path) -> str:
    """The text of a regular, small file; anything else could block or fill the memory."""
    try:
        if kind := KINDS.get(stat.S_IFMT(path.stat().st_mode)):
            raise ConfigError(f"this is {kind}, not a file")

        with path.open("rb") as file:
            found = file.read(BYTES + 1)

        if len(found) > BYTES:
            raise ConfigError(f"more than {BYTES:,} bytes")

        return found.decode()
    except UnicodeDecodeError:
        raise ConfigError("this is not a UTF-8 text file") from None
    except OSError as error:
        raise ConfigError(error.strerror or str(error)) from None


def shipped() -> dict[str, Path]:
    """The files of configs/ by name, such as byol_r50_in1k or studies/byol_masks."""
    files = sorted(CONFIGS.rglob("*.yaml"))
    return {str(path.relative_to(CONFIGS).with_suffix("")): path for path in files}


def find(recipe: str | Path, beside: Path = Path()) -> Path:
    """The file of a recipe, given as a path below `beside` or as the name of a file of configs/.
    A file at the path wins. Raises ConfigError for an unknown name.
    """
    path, name = beside / recipe, str(recipe).removesuffix(".yaml")
    try:
        if path.is_file():
            return path

        known = shipped()
        if name in known:
            return known[name]
        if path.exists() or path.suffix or "/" in name:
            return path
    except (OSError, ValueError):
        # too long, or with a NUL; `read` explains what is wrong with a path
        return path

    near = difflib.get_close_matches(name[:SHOWN], known, n=3, cutoff=0.5)
    hint = f"the nearest are {', '.join(near)}" if near else "`scaletrain show methods` lists them"
    raise ConfigError(f"there is neither a file nor a recipe named '{brief(name)}'; {hint}")


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe, by path or name, with its bases merged under it. A figure that is `published` for a
    base is not one for this recipe.
    """
    path = find(path)
    try:
        path = path.resolve()
        there = path.exists()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a name that is too long, links in a circle, a NUL
        raise ConfigError(f"{brief(str(path))} cannot be a recipe: {brief(str(error))}") from None

    if path in seen:
        raise ConfigError(f"{path}: `base:` leads back to itself")
    if len(seen) > BASES:
        raise ConfigError(f"{path}: more than {BASES} recipes extend each other by `base:`")

    if not there:
        near = nearest(
            path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        )
        raise ConfigError(f"{brief(str(path), 1000)}: no such recipe{near}")

    raw = document(path)
    if raw is None:
        raw = {}

    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, not a {type(raw).__name__}")

    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str) or not base.isprintable():
        raise ConfigError(f"{path}: `base:` is the path of a recipe, not {brief(repr(base))}")

    under = read(find(base, path.parent), (*seen, path))
    under.pop("published", None)
    return merge(under, raw)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` merged into `under`, recursively. A method or engine with another `name` replaces the
    whole section, since the other keys belong to the name.
    """
    result = dict(under)

    for key, value in over.items():
        old, new = long(key, result.get(key)), long(key, value)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            renamed = (
                key in ("method", "engine")
                and "name" in new
                and new["name"] != old.get("name", new["name"])
            )
            result[key] = dict(new) if renamed else merge(old, new)
        elif isinstance(old, list) and isinstance(new, Mapping):
            result[key] = _merge_items(key, old, new)
        else:
            result[key] = value

    return result


def _merge_items(key: str, old: list[Any], new: Mapping[str, Any]) -> list[Any]:
    """`data.views.1.size=96`: a mapping of positions over a list."""
    places = [str(i) for i in range(len(old))]
    if bad := [name for name in new if name not in places]:
        there = brief(", ".join(places)) or "none"
        raise ConfigError(
            f"'{brief(key)}' is a list; its items are {there}, not '{brief(str(bad[0]))}'"
        )

    merged = merge(dict(zip(places, old, strict=True)), new)
    return [merged[place] for place in places]


def apply(raw: Mapping[str, Any], overrides: Iterable[str]) -> Mapping[str, Any]:
    """`raw` with dotted overrides such as `optim.lr=0.45` or `data.views.1.size=96` merged over it,
    later ones last.
    """
    # A new name replaces its section, so names go first: `method.tau=.9 method.name=byol` keeps
    # tau.
    for text in sorted(
        overrides, key=lambda text: not re.match(r"(method|engine)(\.name)?=", text)
    ):
        raw = merge(raw, _override(text))

    return raw


def _override(text: str) -> dict[str, Any]:
    """`optim.lr=0.45` -> {"optim": {"lr": 0.45}}; the value is read as YAML."""
    key, sign, value = text.partition("=")
    parts = key.split(".")
    if not sign or not key or not all(parts) or len(parts) > DEPTH:
        raise ConfigError(
            f"'{brief(text)}': an override has the form key.subkey=value, e.g. optim.lr=0.45"
        )

    try:
        result = parse(value)
    except ConfigError as error:
        raise ConfigError(f"'{brief(text)}': {error}") from None

    for part in reversed(parts):
        result = {part: result}

    return cast(dict[str, Any], result)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, under dotted keys."""
    if isinstance(value, Mapping):
        return {
            k: v
            for key, inner in value.items()
            for k, v in flat(inner, f"{prefix}.{key}" if prefix else key).items()
        }
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return {
            k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{prefix}.{i}").items()
        }

    return {prefix: value}
