"""How Sphinx builds these pages: ``sphinx-build --fail-on-warning docs build/docs``."""

from __future__ import annotations

import sys
from pathlib import Path

import bactrian

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "Bactrian"
copyright = "the Bactrian authors"
version = release = bactrian.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mlir_lexer"]
exclude_patterns = ["_ext"]
default_role = "code"  # docstrings write code in single backticks too

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # signatures and the Args sections say them
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "Bactrian"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sourcelink = False
