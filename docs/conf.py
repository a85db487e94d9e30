"""The documentation site: `make docs` builds it into build/site, where a warning is an error."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "fusedbun"
author = "fusedbun"
language = "en"
source_suffix = {".md": "markdown"}

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "extension",
]

html_theme = "furo"
html_title = "fusedbun"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_domain_indices = False
html_use_index = False  # the search finds more
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"  # of `extension`: no page asks another server for anything

myst_enable_extensions = ["attrs_block", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a generated table may begin below the level that is next

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what an argument may be
add_function_parentheses = False
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
copybutton_exclude = ".linenos, .gp, .go"

# Every name that is referred to must be found, but for those of libraries that document themselves elsewhere.
nitpicky = True
nitpick_ignore_regex = [
    ("py:exc", r"(\w+Error|OSError)"),
    ("py:class", r"(torch|optax|jax)\..*"),
]
