"""The spec model: one YAML file, one named behaviour.

    spec = load(Path("specs/who-are-you.spec.yaml"))
    spec.cases[0].id                       # 'who-are-you/anchor/1 你是誰'

A file is checked against ``spec.schema.json`` (shipped with the package) before anything in it is used; an error names
the file, the line, the key, and the nearest valid key.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from jsonschema import Draft202012Validator, ValidationError

Kind = Literal["target", "contrast", "preserve", "general"]
Split = Literal["anchor", "dev", "heldout"]
SPLITS: tuple[Split, ...] = ("anchor", "dev", "heldout")
DEFAULT_MAX_TOKENS = 24


class SpecError(Exception):
    """A spec file that cannot be used; the message says file, line, key and what to do."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt and what its reply is checked for."""

    spec: str
    kind: Kind
    split: Split
    number: int
    """Position in its split, from 1."""
    prompt: str
    expect: Mapping[str, Any] = field(hash=False)  # a mapping has no hash; the rest names the case
    """A check as in the schema; empty: nothing beyond the kind's own rule."""
    max_tokens: int
    template: str | None
    """``chat`` or ``runner``; None: the run's choice."""

    @property
    def id(self) -> str:
        """Readable and unique in a suite: ``spec/split/number prompt``."""
        return f"{self.spec}/{self.split}/{self.number} {self.prompt}"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One named behaviour."""

    name: str
    kind: Kind
    says: str
    path: Path
    cases: tuple[Case, ...]


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a spec file."""
    text = Path(__file__).with_name("spec.schema.json").read_text(encoding="utf-8")
    return cast(dict[str, Any], json.loads(text))


def load(path: Path) -> Spec:
    """Read and check one spec file. Raises SpecError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SpecError(
            f"{where}: not valid YAML: {', '.join(filter(None, (error.context, error.problem)))}; "
            "a text that holds , : ? # [ or { needs quotes"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if twice := _repeated_key(root):
        raise SpecError(f"{path}:{twice.start_mark.line + 1}: the key {twice.value!r} stands twice; join the two")
    problems = sorted(
        Draft202012Validator(schema()).iter_errors(data),
        key=lambda e: (_line(root, list(e.absolute_path)), e.validator == "required"),  # a misspelt key is also missing
    )
    if problems:
        raise SpecError(_explain(path, root, problems[0]))
    cases: list[Case] = []
    shared = data.get("expect", {})
    for split in SPLITS:
        for number, item in enumerate(data["cases"].get(split, []), 1):
            own = {} if isinstance(item, str) else {key: value for key, value in item.items() if key != "prompt"}
            prompt = item if isinstance(item, str) else item["prompt"]
            where = f"{path}:{_line(root, ['cases', split, number - 1])}: case {prompt!r}"
            if data["kind"] in ("target", "general") and not (own or shared):
                raise SpecError(
                    f"{where} has nothing to check; give it a check (contains, number, …) or the spec an expect"
                )
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise SpecError(f"{where} holds half a character; write the character itself, not two \\u escapes")
            _check_checks([own, shared], where)
            cases.append(
                Case(
                    spec=data["spec"],
                    kind=data["kind"],
                    split=split,
                    number=number,
                    prompt=prompt,
                    expect={"all": [shared, own]} if own and shared else own or shared,
                    max_tokens=data.get("max_tokens", DEFAULT_MAX_TOKENS),
                    template=data.get("template"),
                )
            )
    return Spec(name=data["spec"], kind=data["kind"], says=data["says"], path=path, cases=tuple(cases))


def _repeated_key(node: yaml.Node | None) -> yaml.Node | None:
    """The second of two equal keys of one mapping: YAML would silently drop the first, and every case under it."""
    waiting, visited = [node], set[int]()  # by identity: an alias may make the document a graph
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            known = set[str]()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in known:
                        return key
                    known.add(key.value)
                waiting.append(value)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return None


def _check_checks(value: Any, where: str) -> None:
    """Refuse what the schema cannot see: a regex that does not compile, a fold with nothing beside it."""
    if isinstance(value, dict):
        if value.keys() == {"fold"}:
            raise SpecError(
                f"{where}: fold alone checks nothing; put it beside the check (contains, regex, …) it is for"
            )
        if isinstance(value.get("regex"), str):
            try:
                re.compile(value["regex"])
            except re.error as error:
                raise SpecError(f"{where}: regex {value['regex']!r} is not valid: {error}") from error
        for inner in value.values():
            _check_checks(inner, where)
    elif isinstance(value, list):
        for inner in value:
            _check_checks(inner, where)


def _line(node: yaml.Node | None, path: list[Any]) -> int:
    """The line (from 1) of the deepest node that ``path`` reaches."""
    line = 1
    for step in [None, *path]:
        if isinstance(node, yaml.MappingNode) and step is not None:
            found = next(((key, value) for key, value in node.value if key.value == step), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
            continue
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
        if node is not None:
            line = node.start_mark.line + 1
    return line


def _explain(path: Path, root: yaml.Node | None, problem: ValidationError) -> str:
    """One line for one schema violation; of a ``oneOf`` the branch that came closest speaks."""
    while problem.context:
        deepest = max(problem.context, key=lambda e: (len(e.absolute_path), e.validator != "type"))
        if deepest.validator == "type" and len(deepest.absolute_path) == len(problem.absolute_path):
            break
        problem = deepest
    where = list(problem.absolute_path)
    key = ".".join(str(step) for step in where) or "(top level)"
    message = problem.message
    if problem.validator in ("additionalProperties", "unevaluatedProperties") and isinstance(problem.instance, dict):
        valid = _valid_keys(problem)
        for unknown in (k for k in problem.instance if k not in valid):
            near = difflib.get_close_matches(str(unknown), valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
            return f"{path}:{_line(root, [*where, unknown])}: {key}: unknown key {unknown!r}; {hint}"
    if problem.validator == "required" and isinstance(problem.instance, dict):
        missing = [k for k in cast(list[str], problem.validator_value) if k not in problem.instance]
        message = f"missing key {', '.join(map(repr, missing))}"
    if problem.validator == "enum":
        message = f"{problem.instance!r} is not one of {', '.join(map(str, cast(list[str], problem.validator_value)))}"
    if problem.validator == "oneOf":
        message = f"{problem.instance!r} is neither a text nor a mapping or list of the allowed form"
    return f"{path}:{_line(root, where)}: {key}: {message}"


def _valid_keys(problem: ValidationError) -> list[str]:
    keys = list(cast(dict[str, Any], problem.schema).get("properties", {}))
    if problem.validator == "unevaluatedProperties":
        keys += list(schema()["$defs"]["checkKeys"]["properties"])
    return keys
