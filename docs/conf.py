"""Sphinx: Markdown by myst-nb, docstrings by numpydoc, formulas as MathML. `docs/build.py` prepares the sources."""

from __future__ import annotations

import html
from importlib import metadata

from docutils import nodes
from latex2mathml.converter import convert

import workbench

project, author = "h-space workbench", "the h-space workbench authors"
copyright = "2026, the h-space workbench authors"
version = release = workbench.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "numpydoc"]
root_doc = "docs/index"
exclude_patterns = ["README.md"]
html_theme = "furo"
html_title = f"h-space workbench {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

# Notebooks are shown as `workbench run` left them.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type"]  # of widgets, which a page without a kernel can't show

default_role = "py:obj"  # names in backticks become links where they are documented
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
numpydoc_xref_param_type = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types, with shapes
autodoc_inherit_docstrings = False


def _formula(latex: str, display: str) -> str:
    try:
        return convert(latex.strip(), display=display)
    except Exception:  # the converter raises errors of many kinds on LaTeX that it does not know
        return f'<code class="latex">{html.escape(latex)}</code>'


def _inline(self, node: nodes.math) -> None:
    self.body.append(_formula(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(self, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{_formula(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app) -> dict:
    """MathJax would be asked of the network; browsers draw MathML themselves."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.config.html_math_renderer = "mathml"
    return {"version": metadata.version("latex2mathml"), "parallel_read_safe": True, "parallel_write_safe": True}
