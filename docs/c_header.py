"""The directive `c-header`: a C header as a page, its declarations under its comments.

The header is laid out as carafepp.h is. Its first comment is the overview, with sections that begin
with a "Word:". Blank lines separate what follows: a comment, and the declarations that it is for.
Declarations, members and enumerators may have a comment behind them. Indented lines and tables stay
as they are. Anything else is an error.
"""

import re
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

COMMENT = re.compile(r"/\*(.*?)\*/", re.S)
BEHIND = r"[ ]*(?:/\*(.*?)\*/)?\s*"
DECLARATION = re.compile(r"([^;{]*(?:\{.*?\}[^;]*)?);" + BEHIND, re.S)
MEMBER = re.compile(r"(.*?[\s*])(\w+(?:\[\d+\])?(?:, \w+)*);" + BEHIND, re.S)
ENUMERATOR = re.compile(r"(\w+ = \w+),?" + BEHIND, re.S)
OURS = re.compile(r"\b(?:carafepp|CARAFEPP)_\w+")

logger = logging.getLogger(__name__)


def matches(pattern, text):
    """Return the groups of the pattern's matches, which have to cover the text."""
    text, found = text.strip(), []
    while text:
        match = pattern.match(text)
        if not match:
            raise ExtensionError(f"c-header does not understand: {text[:200]}")
        found.append([group or "" for group in match.groups()])
        text = text[match.end() :]
    return found


def lines_of(comment):
    """Return the lines of a comment without its frame."""
    return [re.sub(r"^ \* ?", "", line).rstrip() for line in comment.strip().split("\n")]


def is_verbatim(line):
    """Tell whether a line is indented, or a row of a table."""
    return bool(re.search(r"^    |\S {3,}\S", line))


class Page:
    """The sections of the page: title -> lines of reStructuredText."""

    def __init__(self, header):
        code = COMMENT.sub("", header)
        self.roles = {
            name: role
            for role, pattern in {
                "func": r"(carafepp_\w+)\(",
                "enumerator": r"(CARAFEPP_\w+) = ",
                "struct": r"typedef struct (\w+)",
                "type": r"typedef [^;{]*?(carafepp_\w+)\)?[;(]",
                "macro": r"#define (CARAFEPP_\w+)",
            }.items()
            for name in re.findall(pattern, code)
        }
        self.sections = {}
        self.read_overview(lines_of(COMMENT.match(header)[1])[1:])  # without the licence
        declarations = re.search(r'extern "C" \{\n#endif(.*)#ifdef', header, re.S)
        self.begin("Types and constants")
        for comment, name in re.findall(r"/\*(.*)\*/\n#if .*\n#define (\w+)", header):
            self.directive("macro", [name], comment)
        for chunk in declarations[1].strip().split("\n\n"):
            self.read_chunk(chunk)

    def begin(self, title):
        """Begin a section, or go on with it."""
        self.lines = self.sections.setdefault(title, [])

    def write(self, lines, indent=0):
        """Add lines and a blank one."""
        self.lines += [" " * indent + line for line in lines] + [""]

    def text(self, lines, indent=0):
        """Add prose and verbatim blocks."""
        for verbatim, block in groupby(lines, is_verbatim):
            if verbatim:
                self.write(["::", "", *("    " + line for line in block)], indent)
            else:
                self.write([self.prose(line) for line in block], indent)

    def prose(self, line):
        """Return a line with names in backticks as code, and links."""
        line = re.sub(r"[\\*|]|_(?!\w)", r"\\\g<0>", line)
        return OURS.sub(self.reference, re.sub(r"`(\w+)`", r"``\1``", line))

    def reference(self, match):
        """Return a link to what the header declares."""
        role = self.roles.get(match[0])
        return f":c:{role}:`{match[0]}`" if role else match[0]

    def directive(self, kind, declared, comment, indent=0):
        """Add what a comment is for."""
        first = f".. c:{kind}:: "
        lines = [first + declared[0], *(" " * len(first) + more for more in declared[1:])]
        if kind in ("enumerator", "member"):
            lines.append("   :no-contents-entry:")
        self.write(lines, indent)
        self.text(lines_of(comment), indent + 3)

    def read_overview(self, lines):
        """Begin a section at each "Word:", whose other lines are indented by nine spaces."""
        self.begin("")
        text = []
        for line in lines:
            if word := re.match(r"([A-Z]\w+): +", line):
                self.text(text)
                text = []
                if word[1] != "Source":
                    self.begin(word[1])
                    line = line[word.end() :]
            text.append(re.sub("^ {9} ?", "", line))
        self.text(text)

    def read_chunk(self, chunk):
        """Add the declarations of a chunk."""
        comment, code = re.fullmatch(r"(?:/\*(.*?)\*/\n)?(.*)", chunk, re.S).groups()
        comment, functions = comment or "", []
        for declaration, behind in matches(DECLARATION, code):
            declaration = " ".join(declaration.split()) if "{" not in declaration else declaration
            if declaration.startswith("CARAFEPP_API "):
                self.begin("Functions")
                signature = declaration.removeprefix("CARAFEPP_API ")
                if behind:
                    self.directive("function", [signature], behind)
                else:
                    functions.append(signature)
            elif struct := re.fullmatch(r"typedef struct (\w+) \{(.*)\} \w+", declaration, re.S):
                self.directive("struct", [struct[1]], comment)
                comment = ""
                for kind, names, about in matches(MEMBER, struct[2]):
                    kind = " ".join(kind.split()) + " "
                    self.directive("member", [kind + name for name in names.split(", ")], about, 3)
            elif enum := re.fullmatch(r"enum \{(.*)\}", declaration, re.S):
                self.text(lines_of(comment))
                comment = ""
                for about, names in groupby(matches(ENUMERATOR, enum[1]), itemgetter(1)):
                    self.directive("enumerator", [name for name, _ in names], about)
            else:
                self.directive("type", [declaration.removeprefix("typedef ")], comment)
                comment = ""
        if functions:
            self.directive("function", functions, comment)
        elif comment:
            raise ExtensionError(f"c-header does not see what this is for: {comment}")


class CHeader(SphinxDirective):
    """The directive; its argument is the path of the header."""

    required_arguments = 1

    def run(self):
        """Return the sections."""
        _, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(path)
        header = Path(path).read_text()
        result = []
        for title, lines in Page(header).sections.items():
            section = nodes.section(ids=[nodes.make_id(title)], names=[title])
            section += nodes.title(title, title)
            self.state.nested_parse(StringList(lines, path), 0, section)
            result += [section] if title else section.children[1:]  # what comes first has no title
        names = {name for name in OURS.findall(COMMENT.sub("", header)) if not name.endswith("_H")}
        self.env.domaindata["c"].setdefault("of_headers", set()).update(names)
        return result


def check(app, env):
    """Warn of names in a header that its page lacks."""
    documented = {entry[0] for entry in env.domains.c_domain.get_objects()}
    for name in sorted(env.domaindata["c"].get("of_headers", set()) - documented):
        logger.warning("the page of the C header lacks %s", name)


def setup(app):
    """Register the directive and its check."""
    app.add_directive("c-header", CHeader)
    app.connect("env-check-consistency", check)
