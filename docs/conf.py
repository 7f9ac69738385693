"""The site of the documentation: sphinx-build -W docs build/site.

Pages are Markdown that reads well on a code host too: their links are relative paths to files. Here
a link to a file outside docs/ becomes its address there.
"""

import ast
import importlib
import inspect
import os
import re
import sys
from pathlib import Path

from sphinx.ext.autodoc.mock import _MockObject, mock
from sphinx.util import logging
from sphinx.util.inspect import stringify_signature

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT / "python")]

REPOSITORY = "https://github.com/carafepp/carafepp"

project = "carafepp"
author = "the authors of carafepp"
version = release = re.search(
    r"project\(carafepp VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text()
)[1]

extensions = [
    "c_header",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
nitpicky = True  # a reference without a target is a warning, thus an error
default_role = "py:obj"  # a name in single backticks is a link where the reference has it
nitpick_ignore_regex = [  # types and arguments
    (r"py:(obj|class|exc)", r"(?!carafepp\.).*"),
    (r"c:identifier", r"u?int\d+_t|size_t"),
]

# Signatures and docstrings come from python/, without a compiler and without these packages.
autodoc_mock_imports = [
    "carafepp._core",
    "flax",
    "jax",
    "jaxlib",
    "matplotlib",
    "torch",
    "ultralytics",
]
_MockObject.__or__ = _MockObject.__ror__ = lambda self, other: self  # in types: torch.dtype | None
autodoc_typehints = "none"  # docstrings tell types, and shapes with them
autodoc_preserve_defaults = True  # as the source has them
python_maximum_signature_line_length = 120
c_maximum_signature_line_length = 80
add_module_names = False
highlight_language = "none"  # of formulas and commands; programs say theirs
smartquotes_action = "D"  # dashes alone: H' is a size, not a quotation
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False  # "up, down : int" stays one entry
napoleon_use_ivar = True

myst_heading_anchors = 4  # links to headings, by the names that a code host gives them

linkcheck_timeout = 20
linkcheck_ignore = [re.escape(REPOSITORY)]  # read_page looks for its files in the working tree

html_theme = "furo"
html_title = f"carafepp {version}"
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")  # for search engines
html_favicon = "favicon.svg"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [],
    "light_css_variables": {"code-font-size": "76%"},  # lines of 95 characters fit
}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# Pages that show another file of the repository.
SHOWN = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}

# Modules whose public names the reference must have.
MODULES = [
    "carafepp",
    "carafepp.torch",
    "carafepp.torch.mmcv",
    "carafepp.torch.models",
    "carafepp.torch.models.inpainting",
    "carafepp.torch.ultralytics",
    "carafepp.jax",
    "carafepp.viz",
]

logger = logging.getLogger(__name__)


def read_page(app, docname, source):
    """Put another file in the place of a page, and the address of files in the place of paths."""
    folder = (DOCS / docname).parent
    shown = SHOWN.get(docname)
    if shown:
        source[0] = (ROOT / shown).read_text()
        app.env.note_dependency(str(ROOT / shown))

    def link(match):
        path, anchor = match[1], match[2] or ""
        target = ((ROOT if shown else folder) / path).resolve()
        if not target.exists():
            return match[0]  # MyST complains
        if target.is_relative_to(DOCS) and target.is_file():
            return f"]({os.path.relpath(target, folder)}{anchor})"
        kind = "tree" if target.is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{target.relative_to(ROOT)}{anchor})"

    source[0] = re.sub(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)", link, source[0])


def keep_initials(app, what, name, obj, options, lines):
    """Escape the initial of "J. Wang", which would number a list."""
    lines[:] = [re.sub(r"^(\s*[A-Z])\. ", r"\1\\. ", line) for line in lines]


def sign(app, what, name, obj, options, signature, returned):
    """Return a signature without **unknown, whose names are errors.

    That of a class is its __init__'s, as a base class that is a mock hides it.
    """
    init = getattr(obj, "__init__", None)
    if what == "class" and inspect.isfunction(init) and init.__module__.startswith("carafepp"):
        signature = stringify_signature(inspect.signature(init), show_annotation=False)
        signature = re.sub(r"\(self(, )?", "(", signature)
    return signature and signature.replace(", **unknown", ""), returned


def public_names(module):
    """Return what a module exports: __all__, else the names that it defines itself."""
    if hasattr(module, "__all__"):
        return module.__all__
    tree = ast.parse(Path(module.__file__).read_text())
    defined = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [node.name for node in defined if not node.name.startswith("_")]


def check_reference(app, env):
    """Warn of public names that the reference lacks."""
    documented = env.domains.python_domain.objects
    with mock(app.config.autodoc_mock_imports):
        for name in MODULES:
            module = importlib.import_module(name)
            for public in public_names(module):
                if f"{name}.{public}" in documented:
                    continue
                home = getattr(getattr(module, public), "__module__", name)  # named so elsewhere
                if f"{home}.{public}" not in documented:
                    logger.warning("the reference lacks %s.%s", name, public)


def setup(app):
    """Connect the functions of this file."""
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", keep_initials)
    app.connect("autodoc-process-signature", sign)
    app.connect("env-check-consistency", check_reference)
