"""The syntax of chat templates: which nodes they may have, and what is added to count work."""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.visitor import NodeTransformer

# Filters that only the rewriting below can name: a "#" is in no identifier.
COUNTED = "#counted"  # items, cost -> the items, each of which spends `cost`
MADE = "#made"  # value -> itself, after spending for its size
MEASURED = "#measured"  # value -> itself, after spending for a walk through it
SPEND = "#spend"  # cost -> nothing

_NODES_PER_UNIT = 8

_ALLOWED = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro),
    *(nodes.CallBlock, nodes.FilterBlock, nodes.With, nodes.Assign, nodes.AssignBlock),
    *(nodes.Scope, nodes.Break, nodes.Continue, nodes.Name, nodes.NSRef, nodes.Const, nodes.Tuple),
    *(nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.CondExpr, nodes.Filter, nodes.Test),
    *(nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat, nodes.Compare),
    *(nodes.Operand, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod),
    *(nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Pos),
)
# Arguments as tuples: tuples of tuples can be hashed, at a cost that doubles with each level.
_REFUSED_NAMES = frozenset({"varargs", "kwargs", "self"})


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks training targets; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Any) -> nodes.Node:
        """Content of the tag, as a scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def rewrite(template: nodes.Template) -> nodes.Template:
    """The same template, with filters that count; in place.

    Raises TemplateSyntaxError for a kind of node that chat templates have no use for.
    """
    for node in (template, *template.find_all(nodes.Node)):
        if type(node) not in _ALLOWED:
            raise TemplateSyntaxError(f"{type(node).__name__} is not allowed", node.lineno)
        if isinstance(node, nodes.Name) and node.name in _REFUSED_NAMES:
            raise TemplateSyntaxError(f"{node.name} is not allowed", node.lineno)
        if isinstance(node, nodes.For) and node.recursive:
            raise TemplateSyntaxError("a recursive loop is not allowed", node.lineno)
    return _Counting().visit(template)


class _Counting(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.For:
        cost = nodes.Const(_cost(node))
        self.generic_visit(node)
        node.iter = _filter(node.iter, COUNTED, cost)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        cost = nodes.Const(_cost(node))
        self.generic_visit(node)
        spend = nodes.ExprStmt(_filter(cost, SPEND), lineno=node.lineno)
        node.body.insert(0, spend)
        return node

    visit_CallBlock = visit_Macro  # its body is a macro too, the caller's

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _filter(node.expr, MEASURED)
        for operand in node.ops:
            operand.expr = _filter(operand.expr, MEASURED)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(node, MADE) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "join")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        # A list has no hash; see _REFUSED_NAMES.
        self.generic_visit(node)
        return node if node.ctx == "store" else nodes.List(node.items, lineno=node.lineno)


def _cost(node: nodes.Node) -> int:
    return 1 + sum(1 for _ in node.find_all(nodes.Node)) // _NODES_PER_UNIT


def _filter(value: nodes.Expr | nodes.Node, name: str, *args: Any) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)
