"""How Sphinx builds these pages: Markdown by MyST, the API reference from docstrings and signatures as they are."""

from sphinx.pycode import ModuleAnalyzer

from longtail.version import __version__

project = "longtail"
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # "page.md#a-heading" as on GitHub

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100  # one argument a line where a signature is longer
napoleon_use_rtype = False

# Signatures are shown as they are at run time, with every option; overloads are for type checkers.
for overloaded in ("longtail.functional.softmax",):
    analyzer = ModuleAnalyzer.for_module(overloaded)
    analyzer.analyze()
    analyzer.overloads.clear()

# Every name of ours that a page or a docstring points to exists; other projects' names are left as text, and so are
# the types of annotations that are no public names.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!longtail\.).*"), ("py:class", r"longtail\.[a-z_.]+\.(Array|Element|_ModelLoss)")]

html_theme = "furo"
html_title = f"longtail {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_copyright = False
