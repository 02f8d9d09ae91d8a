"""What the site adds to MkDocs: formulas as MathML, which needs no script, and the fields of a class as one table."""

import ast
import html
import re
from contextlib import suppress
from typing import Any

import griffe
from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
DISPLAY = {"span": "inline", "div": "block"}
UNKNOWN = (KeyError, AttributeError, griffe.AliasResolutionError)  # a name that is built in, or another package's


def on_page_content(content: str, **_: Any) -> str:
    """Turn the formulas that pymdownx.arithmatex marked into MathML."""
    return FORMULA.sub(lambda found: convert(html.unescape(found[2]), display=DISPLAY[found[1]]), content)


class Fields(griffe.Extension):
    """Show the fields of dataclasses, named tuples and pydantic models as a table with their meaning and default."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Make the tables of a package, once all of it is read."""
        modules = [pkg]
        for module in modules:
            modules += [inner for inner in module.modules.values() if not inner.is_alias]
            for cls in module.classes.values():
                if not cls.is_alias and cls.docstring and _has_fields(cls):
                    rows = [_row(member) for member in cls.members.values() if _is_field(member)]
                    cls.docstring.parsed.insert(1, griffe.DocstringSectionParameters(rows, title="Fields:"))
                    cls.members.pop("__init__", None)  # its signature would say the same


def _has_fields(cls: griffe.Class) -> bool:
    bases = {str(base) for one in (cls, *cls.mro()) for base in one.bases}
    return "dataclass" in cls.labels or not bases.isdisjoint({"NamedTuple", "BaseModel"})


def _is_field(member: griffe.Object | griffe.Alias) -> bool:
    """Whether a member is a field: not a property, and neither without annotation nor a ClassVar."""
    if not member.is_attribute or member.is_alias or member.is_private or "property" in member.labels:
        return False
    return member.annotation is not None and "instance-attribute" in member.labels


def _row(field: griffe.Attribute) -> griffe.DocstringParameter:
    """Name, type, meaning and default; the meaning is the docstring, the comment behind it, or the type's docstring."""
    docstring, field.docstring = field.docstring, None  # so that the field is not listed a second time
    text = docstring.value if docstring else field.lines[-1].partition("  # ")[2]
    with suppress(*UNKNOWN):
        text = text or field.module[str(field.annotation)].docstring.value.split("\n\n")[0]
    plain = _plain(str(field.annotation), field.module)
    annotation = field.annotation if plain == str(field.annotation) else plain  # the former has links
    return griffe.DocstringParameter(field.name, annotation=annotation, description=text, value=_default(field))


def _default(field: griffe.Attribute) -> Any:
    """The default; for `SAMPLING.num_steps`, where SAMPLING = SamplingSettings(), that of the other class."""
    if "init=False" in str(field.value):
        return "computed"
    instance, _, name = str(field.value).partition(".")
    with suppress(*UNKNOWN):
        return field.module[str(field.module[instance].value).removesuffix("()")][name].value
    return field.value


def _plain(annotation: str, module: griffe.Module) -> str:
    """An annotation with its aliases replaced and its limits written out: `int ≥ 1` for `Positive`."""

    def plain(node: ast.expr) -> str:
        match node:
            case ast.Name() | ast.Attribute():
                with suppress(*UNKNOWN):
                    alias = module[ast.unparse(node)]
                    alias = alias.final_target if alias.is_alias else alias
                    if alias.is_attribute:
                        return _plain(str(alias.value), alias.module)
            case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[kind, *rest])):
                words = [word for call in rest if isinstance(call, ast.Call) for word in call.keywords]
                return plain(kind) + _limits({str(word.arg): ast.unparse(word.value) for word in words})
            case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
                return ast.unparse(choices).strip("()").replace(", ", " | ")
            case ast.Subscript(value=kind, slice=ast.Tuple(elts=parts)):
                return f"{plain(kind)}[{', '.join(map(plain, parts))}]"
            case ast.BinOp(left=left, right=right):
                return f"{plain(left)} | {plain(right)}"
        return ast.unparse(node)

    return plain(ast.parse(annotation, mode="eval").body)


def _limits(field: dict[str, str]) -> str:
    """The limits in the arguments of pydantic's Field: ` ≥ 1`, ` in [0, 1)`."""
    low, high = field.get("ge", field.get("gt")), field.get("le", field.get("lt"))
    if low and high:
        return f" in {'[' if 'ge' in field else '('}{low}, {high}{']' if 'le' in field else ')'}"
    return f" {'≥' if 'ge' in field else '>'} {low}" if low else ""
