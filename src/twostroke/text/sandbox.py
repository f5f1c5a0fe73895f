"""The sandbox chat templates run in: Jinja's, with bounds on time, memory and output.

A template comes with a model file and may be hostile. Jinja's own sandbox keeps it from reaching
Python; this module keeps it from hanging or filling memory, by routing through a `Guard`:

- loops and macros: each turn is a step; steps are counted and a deadline is looked at on each, so
  nested and empty loops, recursive macros and long filter chains all end;
- text: whatever joins, repeats, formats or replaces is measured before it is made, against a limit
  for one value and one for all of a rendering; numbers stop at a few thousand bits;
- lists: repeating and adding them is measured, and so are literals and filters that nest them, with
  all they hold;
- what else can grow a value by a number (center, ljust, zfill, wide formats …) is refused by name.

Not bounded is the time of one comparison between nested lists made to compare slowly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from twostroke.text.guard import Guard

if TYPE_CHECKING:
    from jinja2 import Environment, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_INDENT = 100

_REFUSED_FILTERS = (
    "batch",
    "center",
    "filesizeformat",
    "format",
    "pprint",
    "random",
    "round",
    "slice",
    "sum",
    "truncate",
    "urlize",
    "wordwrap",
    "xmlattr",
)


def build_environment(guard: Guard) -> ImmutableSandboxedEnvironment:
    """A Jinja environment as Hugging Face's chat templates expect it, under `guard`.

    The hooks are set on the instance, where Jinja looks them up like the methods of a subclass.
    """
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    plain_call = environment.call

    def call(context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        guard.check_call(function, [*args, *kwargs.values()])
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            return guard.join(args[0], separator=owner)
        if isinstance(owner, str) and name == "replace":
            return guard.replace(owner, *args)
        result = plain_call(context, function, *args, **kwargs)
        return guard.keep(result) if function is dict else result

    hooks = {
        "call": call,
        "call_binop": lambda _context, operator, left, right: guard.operate(operator, left, right),
        "intercepted_binops": frozenset({"+", "*", "**", "%", "/", "//"}),
        "concat": guard.join,
        "guard_step": guard.step,
        "guard_keep": guard.keep,
        "guard_join": lambda *values: guard.join(values),
        "finalize": lambda value: value if isinstance(value, str) else guard.join([value]),
    }
    for name, hook in hooks.items():
        setattr(environment, name, hook)
    _set_filters(environment, guard)
    return environment


def _set_filters(environment: ImmutableSandboxedEnvironment, guard: Guard) -> None:
    for name in _REFUSED_FILTERS:
        del environment.filters[name]
    del environment.globals["lipsum"]

    def join(values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = [environment.getitem(value, attribute) for value in values]
        return guard.join(values, separator=d)

    def replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
        return guard.replace(str(s), str(old), str(new), -1 if count is None else count)

    def indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        margin = width if isinstance(width, str) else " " * min(width, _MAX_INDENT)
        lines = s.split("\n")
        guard.spend(len(s) + len(lines) * len(margin))
        for at in range(0 if first else 1, len(lines)):
            if lines[at] or blank:
                lines[at] = margin + lines[at]
        return "\n".join(lines)

    def string(value: object) -> str:
        return guard.join([value])

    own: dict[str, Callable[..., Any]] = {
        "join": join,
        "replace": replace,
        "indent": indent,
        "string": string,
        "tojson": guard.write_json,
    }
    environment.filters.update(own)
    for table in (environment.filters, environment.tests):
        for name, function in list(table.items()):
            table[name] = _counted(guard, function)


def _counted(guard: Guard, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, counted as a step and its result kept; `wraps` copies the marks Jinja reads."""

    def run(*args: Any, **kwargs: Any) -> Any:
        guard.step()
        result = function(*args, **kwargs)
        return guard.keep(result) if isinstance(result, str | list) else result

    return functools.wraps(function)(run)


def add_guards(tree: nodes.Template, environment: Environment) -> None:
    """Put the guard's hooks into a parsed template.

    Every loop and macro counts a step per turn; ~ joins under the guard; slices, and literals that
    hold other values, are measured.
    """
    from jinja2 import nodes as kinds

    def call(hook: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
        made = kinds.Call(kinds.EnvironmentAttribute(hook), arguments, [], None, None)
        made.set_lineno(line)
        made.set_environment(environment)
        return made

    def guarded(node: nodes.Node) -> nodes.Node:
        visit(node)
        if isinstance(node, kinds.For | kinds.Macro | kinds.CallBlock):
            step = kinds.ExprStmt(call("guard_step", [], node.lineno))
            node.body.insert(0, step.set_lineno(node.lineno))
        elif isinstance(node, kinds.Concat):
            return call("guard_join", node.nodes, node.lineno)
        elif isinstance(node, kinds.Expr) and _holds_values(node):
            return call("guard_keep", [node], node.lineno)
        return node

    def visit(node: nodes.Node) -> None:
        for name, value in node.iter_fields():
            if isinstance(value, kinds.Node):
                setattr(node, name, guarded(value))
            elif isinstance(value, list):
                value[:] = [
                    guarded(each) if isinstance(each, kinds.Node) else each for each in value
                ]

    visit(tree)


def _holds_values(node: nodes.Expr) -> bool:
    """Whether the expression makes a new value out of others: a slice or a literal."""
    from jinja2 import nodes as kinds

    if isinstance(node, kinds.Getitem):
        return isinstance(node.arg, kinds.Slice)
    if isinstance(node, kinds.Tuple) and node.ctx != "load":
        return False  # the target of an assignment
    return isinstance(node, kinds.List | kinds.Tuple | kinds.Dict)
